// A video's request as a command, for curl and for Python; the names of files that came with it stand for the files.

const FILES = { image: ["input_reference", "first.png", "--image"], last_image: ["last_image", "last.png", "--last-image"],
  continued: ["video", "before.mp4", "--continue-from"] };
const UNSENT = new Set(["given", "extends", "remixed_from_video_id", "reconstructs"]);

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

function python(value) {
  if (value === true) return "True";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([name, own]) => `${JSON.stringify(name)}: ${python(own)}`).join(", ")}}`;
  return JSON.stringify(value);
}

export function copied(kind, video, model, origin, hasKey) {
  const all = video.request;
  const own = Object.fromEntries(Object.entries(all).filter(([name, value]) => value !== null && value !== false && value !== "" && !UNSENT.has(name)));
  const files = (all.given || []).filter((name) => FILES[name] && !(name === "continued" && all.extends)).map((name) => FILES[name]);
  const texts = { cli: command, curl, python: script };
  return texts[kind](all, own, files, { video, model, origin, hasKey });
}

function command(all, own, files, { model }) {
  if (all.reconstructs) return `dicode reconstruct video.mp4 --model ${quoted(all.model)} --seed ${all.seed} -o reconstruction.mp4`;
  const { prompt, shots, size, live, ...flags } = own;
  const board = shots ? shots.map((shot) => `[${shot.seconds}s: ${shot.prompt}]`).join(" ") : prompt;
  if (shots) delete flags.seconds;
  if (size && model) flags.scale = Number(size.split("x")[0]) / model.size;
  if (all.extends) files = [...files, FILES.continued];
  const given = [...Object.entries(flags).map(([name, value]) => `--${name.replaceAll("_", "-")}${value === true ? "" : ` ${value}`}`),
    ...files.map(([, name, flag]) => `${flag} ${name}`)];
  return `dicode generate ${quoted(board)} ${given.join(" ")} -o video.mp4`;
}

function curl(all, own, files, { origin, hasKey }) {
  const head = `curl ${origin}/v1/videos`, key = hasKey ? ` -H "Authorization: Bearer $DICODE_API_KEY"` : "";
  if (all.reconstructs) return `${head}/reconstructions${key} -F model=${quoted(all.model)} -F seed=${all.seed} -F video=@video.mp4`;
  if (!files.length) {
    const body = all.extends ? { ...own, video: { id: all.extends } } : own;
    return `${head}${all.extends ? "/extensions" : ""}${key} -H 'Content-Type: application/json' -d ${quoted(JSON.stringify(body))}`;
  }
  const fields = Object.entries(own).map(([name, value]) => `-F ${quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`);
  const path = files.some(([name]) => name === "video") ? "/extensions" : "";
  return `${head}${path}${key} ${[...fields, ...files.map(([name, file]) => `-F ${name}=@${file}`)].join(" ")}`;
}

function script(all, own, files, { origin, hasKey }) {
  const key = hasKey ? `os.environ["DICODE_API_KEY"]` : `"none"`;
  const start = `${hasKey ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})\n`;
  const end = `client.videos.download_content(video.id).write_to_file("video.mp4")\n`;
  const { model, prompt, seconds, ...rest } = own;
  const field = ([name, file]) => `"${name}": open("${file}", "rb")`;
  if (all.reconstructs || all.extends || files.some(([name]) => name !== "input_reference")) {
    const body = all.extends ? { ...own, video: { id: all.extends } } : all.reconstructs ? { model, seed: all.seed } : own;
    const sent = all.reconstructs ? [["video", "video.mp4"]] : files;
    const path = all.reconstructs ? "/reconstructions" : all.extends || files.some(([name]) => name === "video") ? "/extensions" : "";
    const form = sent.length ? `, files={${sent.map(field).join(", ")}}, options={"headers": {"Content-Type": "multipart/form-data"}}` : "";
    return `${start.replace("import OpenAI\n", "import OpenAI\nfrom openai.types import Video\n")}` +
      `video = client.post("/videos${path}", cast_to=Video, body=${python(body)}${form})\nvideo = client.videos.poll(video.id)\n${end}`;
  }
  const image = files.length ? `, input_reference=open("${files[0][1]}", "rb")` : "";
  const extra = Object.keys(rest).length ? `, extra_body=${python(rest)}` : "";
  return `${start}video = client.videos.create_and_poll(model=${JSON.stringify(model)}, prompt=${JSON.stringify(prompt || "")}, ` +
    `seconds="${seconds}"${image}${extra})\n${end}`;
}
