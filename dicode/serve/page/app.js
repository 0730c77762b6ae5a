// The page of `dicode serve`. A video appears clip by clip while it is rendered; all state is the server's.

const $ = (id) => document.getElementById(id);
const EXAMPLES = {
  blocks: ["a red ball rolls in from the left, then it jumps", "a blue cube falls from above. then it turns green",
    "a big yellow cylinder spins, then it shrinks", "a purple ball pushes an orange cube", "a green cone grows",
    "a pink cube leaves to the right, and then a cyan ball falls from above", "a red cube passes behind a blue cylinder",
    "the small orange ball jumps quickly"],
  sprites: ["a swirling ice vortex", "a fireball", "arcane curse", "a red heart", "lightning strike", "poison cloud",
    "a golden shield", "thumbs up"],
  world: ["close top drawer", "open the drawer", "pick up the can", "put the spoon on the towel", "move the pot",
    "place the bottle upright", "wipe the table", "pick up the apple"],
};
const SAYS = {
  blocks: "Draws coloured balls, cubes, cones and cylinders that roll in, fall, jump, spin, push, pass, grow, shrink, turn and leave; an event every two seconds.",
  sprites: "Draws small pixel-art effects and emoji.",
  world: "Draws what a robot's camera sees.",
};
const SAMPLING = ["guidance", "variance_scale", "first_variance_scale", "temperature", "flow_steps", "context_key_frames", "steps",
  "decoder_guidance", "decoder_temperature", "motion_scale", "dead_band", "motion_tokens"];
const KEPT_S = 60;  // of an endless video, to go back in
const state = { models: [], shots: [], shown: [], current: null, oldest: null };

async function call(path, options = {}) {
  const response = await fetch(path, options);
  if (response.status === 401) {
    const key = prompt("API key of this server");
    if (key) {
      document.cookie = `dicode_key=${encodeURIComponent(key)}; SameSite=Strict; path=/`;
      return call(path, options);
    }
  }
  const body = await response.json();
  if (!response.ok) throw new Error(body.error ? body.error.message : `the server answered ${response.status}`);
  return body;
}

// ---- making

function request() {
  const values = { model: $("model").value, seed: Number($("seed").value) };
  if (state.shots.length) values.shots = [{ prompt: $("prompt").value, seconds: Number($("seconds").value) }, ...state.shots];
  else Object.assign(values, { prompt: $("prompt").value, seconds: Number($("seconds").value) });
  if ($("loop").checked && !$("loop-label").hidden) values.loop = true;
  for (const name of SAMPLING) if ($(`s-${name}`).value !== "") values[name] = Number($(`s-${name}`).value);
  return values;
}

async function make(changes = {}) {
  const values = Object.fromEntries(Object.entries({ ...request(), ...changes }).filter(([, value]) => value !== undefined));
  const files = [["input_reference", $("first").files[0]], ["last_image", $("last").files[0]]].filter(([, file]) => file);
  if (!files.length) {
    return call("/v1/videos", json(values));
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(values)) form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  for (const [name, file] of files) form.append(name, file);
  return call("/v1/videos", { method: "POST", body: form });
}

async function attempt(action) {
  $("error").textContent = "";
  try { return await action(); } catch (error) { $("error").textContent = error.message; return null; }
}

function nextSeed() { if (!$("lock").checked) $("seed").value = Math.floor(Math.random() * 1e9); }

async function submit(event) {
  event.preventDefault();
  const video = await attempt(() => make());
  if (video) { show([video]); nextSeed(); refresh(); }
}

async function four() {
  const first = Number($("seed").value);
  const videos = await attempt(() => Promise.all([0, 1, 2, 3].map((i) => make({ seed: first + i }))));
  if (videos) { show(videos); nextSeed(); refresh(); }
}

async function live() {
  const { shots, ...own } = request();
  const video = await attempt(() => make({ ...own, prompt: $("prompt").value, live: true, seconds: 3600, shots: undefined, loop: undefined }));
  if (video) { show([video]); nextSeed(); $("more").focus(); }
}

async function direct(values) {
  if (await attempt(() => call(`/v1/videos/${state.current.id}/direct`, json(values)))) $("more").value = "";
}

const json = (values) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) });

async function again(video, changes) {
  if (video.request.reconstructs) return;
  const made = await attempt(() => call(`/v1/videos/${video.id}/remix`, json(changes)));
  if (made) { show([made]); refresh(); }
}

async function reconstruct() {
  const file = $("own").files[0];
  if (!file) return;
  const form = new FormData();
  form.append("model", $("model").value);
  form.append("video", file);
  const video = await attempt(() => call("/v1/videos/reconstructions", { method: "POST", body: form }));
  $("own").value = "";
  if (video) { show([video]); refresh(); }
}

async function extend() {
  const video = state.current;
  if (!video) return;
  const text = $("more").value.trim() || video.prompt;
  const made = await attempt(() => call("/v1/videos/extensions", json({ prompt: text || "it goes on", seconds: 2, model: video.model, video: { id: video.id } })));
  if (made) { show([made]); refresh(); }
}

// ---- the storyboard

function drawShots() {
  $("shots").replaceChildren(...state.shots.map((shot, i) => {
    const item = document.createElement("li");
    item.draggable = true;
    item.innerHTML = `<label>Shot ${i + 2}<input type="text" maxlength="4000" required></label>
      <div class="row"><label><span></span><input type="range" min="1" max="20" step="1"></label>
      <button type="button" aria-label="Shot ${i + 2} earlier">←</button><button type="button" aria-label="Shot ${i + 2} later">→</button>
      <button type="button" aria-label="Remove shot ${i + 2}">×</button></div>`;
    const [text, seconds] = item.querySelectorAll("input");
    const [earlier, later, gone] = item.querySelectorAll("button");
    text.value = shot.prompt; seconds.value = shot.seconds;
    text.oninput = () => { shot.prompt = text.value; };
    seconds.oninput = () => {
      shot.seconds = Number(seconds.value);
      item.querySelector("span").textContent = `${shot.seconds} s`;
      item.style.width = `${11 + 0.9 * shot.seconds}rem`;  // as long as it lasts
    };
    seconds.oninput();
    seconds.draggable = true;  // the slider, not the card
    seconds.ondragstart = (event) => { event.preventDefault(); event.stopPropagation(); };
    earlier.onclick = () => moveShot(i, i - 1);
    later.onclick = () => moveShot(i, i + 1);
    gone.onclick = () => { state.shots.splice(i, 1); drawShots(); };
    item.ondragstart = (event) => event.dataTransfer.setData("text/plain", String(i));
    item.ondragover = (event) => { event.preventDefault(); item.classList.add("over"); };
    item.ondragleave = () => item.classList.remove("over");
    item.ondrop = (event) => { event.preventDefault(); moveShot(Number(event.dataTransfer.getData("text/plain")), i); };
    return item;
  }));
}

function moveShot(from, to) {
  if (to >= 0 && to < state.shots.length) state.shots.splice(to, 0, ...state.shots.splice(from, 1));
  drawShots();
}

// ---- showing

function show(videos) {
  for (const own of state.shown) own.stop();
  $("stage").classList.toggle("four", videos.length > 1);
  $("stage").replaceChildren();
  $("frames").replaceChildren();
  state.current = videos[0];
  state.shown = videos.map(watch);
  $("actions").hidden = false;
  drawActions();
  history.replaceState(null, "", videos.length === 1 ? `#${videos[0].id}` : "#");
}

function watch(video) {
  const player = document.createElement("video");
  Object.assign(player, { controls: true, muted: true, autoplay: true, loop: !video.request.live, playsInline: true });
  player.setAttribute("aria-label", `Video: ${video.prompt}`);
  player.onfocus = () => { state.current = video; drawActions(); };
  $("stage").append(player);
  const path = `/v1/videos/${video.id}`;
  if (video.status === "completed") {
    player.src = `${path}/content`;
    drawFrames(video);
    compare(video, player);
    say(video);
    return { stop() {} };
  }
  const events = new EventSource(`${path}/events`);
  let streaming = null;
  const update = async () => { Object.assign(video, await call(path)); say(video); drawActions(); };
  const finished = async () => { events.close(); await update(); refresh(); };
  events.addEventListener("queued", update);
  events.addEventListener("clip", async () => {
    streaming ??= play(player, `${path}/stream`).catch(() => false);
    await update();
    drawFrames(video);
  });
  events.addEventListener("completed", async () => {
    await finished();
    drawFrames(video);
    if (!await streaming) player.src = `${path}/content`;
    compare(video, player);
  });
  events.addEventListener("failed", finished);
  events.addEventListener("deleted", () => events.close());
  say(video);
  return { stop() { events.close(); } };
}

// What was given, over what its tokens hold, up to a slider.
function compare(video, player) {
  if (!video.request.reconstructs || $("stage").querySelector(".both")) return;
  const both = document.createElement("div"), given = document.createElement("video"), slider = document.createElement("input");
  both.className = "both";
  Object.assign(given, { muted: true, playsInline: true, src: `/v1/videos/${video.id}/content?variant=source` });
  given.setAttribute("aria-label", "The given video");
  Object.assign(slider, { type: "range", min: 0, max: 100, value: 50 });
  slider.setAttribute("aria-label", "Share of the picture that shows the given video; the rest is rendered from its tokens");
  slider.oninput = () => { given.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; both.style.setProperty("--share", `${slider.value}%`); };
  slider.oninput();
  const follow = () => { if (Math.abs(given.currentTime - player.currentTime) > 0.06) given.currentTime = player.currentTime; };
  Object.assign(player, { onplay: () => { given.play().catch(() => {}); }, onpause: () => given.pause(), ontimeupdate: follow, onseeked: follow });
  player.replaceWith(both);
  both.append(player, given);
  const box = document.createElement("div");
  box.className = "compare";
  both.replaceWith(box);
  box.append(both, slider);
  player.play().catch(() => {});
}

function say(video) {
  if (video.id !== state.current?.id) return;
  const left = video.seconds_left ? `, about ${Math.ceil(video.seconds_left)} s left` : "";
  const texts = {
    queued: `${video.position ? `Waiting; ${video.position} before it` : "Waiting for the worker"}${left}.`,
    in_progress: video.request.live ? "Live: what is typed takes over at the next key frame." : `Rendering: ${video.progress} %${left}.`,
    completed: video.request.reconstructs ? `Left what was given, right what ${numbers(video)} hold of it.`
      : `${video.seconds} s, seed ${video.request.seed}, written as ${numbers(video)}.`,
    failed: `Failed: ${video.error?.message}`,
  };
  $("state").textContent = texts[video.status];
}

function numbers(video) {
  const model = state.models.find((own) => own.id === video.model);
  if (!model) return "";
  const count = Math.ceil(Number(video.seconds) / model.clip_s) + 1;
  return `${(count * model.numbers_per_keyframe).toLocaleString("en")} numbers`;
}

function drawFrames(video) {
  if (state.shown.length > 1 || video.id !== state.current.id || video.request.live) return;
  const model = state.models.find((own) => own.id === video.model);
  const clip = model ? model.clip_s : 2, total = Math.ceil(Number(video.seconds) / clip - 1e-6) + 1;
  const picture = new Image();
  picture.onload = () => {
    const count = Math.min(total, Math.round(picture.width / picture.height));
    $("frames").replaceChildren(...Array.from({ length: count }, (_, i) => {
      const item = document.createElement("li"), frame = document.createElement("div");
      frame.className = "frame";
      frame.setAttribute("role", "img");
      frame.setAttribute("aria-label", `Key frame at ${i * clip} s`);
      frame.style.backgroundImage = `url(${picture.src})`;
      frame.style.backgroundPositionX = `${-104 * i}px`;
      item.append(frame, `${i * clip} s`);
      if (i + 1 < total && !video.request.reconstructs) for (const [text, clips] of [["Again from here", null], ["This clip alone", 1]]) {
        const reroll = document.createElement("button");
        reroll.type = "button";
        reroll.textContent = text;
        reroll.onclick = () => again(video, { reroll_from: i, reroll_clips: clips, reroll_seed: Math.floor(Math.random() * 1e9) });
        item.append(reroll);
      }
      return item;
    }));
  };
  picture.src = `/v1/videos/${video.id}/content?variant=spritesheet&shown=${video.progress}`;
}

// Fragmented MP4 as it is written, whose codec is named in its first bytes; true once all of it is there.
async function play(player, path) {
  if (!("MediaSource" in window)) return false;
  const source = new MediaSource(), waiting = [];
  player.src = URL.createObjectURL(source);
  await new Promise((opened) => source.addEventListener("sourceopen", opened, { once: true }));
  const reader = (await fetch(path)).body.getReader();
  let buffer = null, head = new Uint8Array();
  const append = async (data) => {
    buffer.appendBuffer(data);
    await new Promise((done) => buffer.addEventListener("updateend", done, { once: true }));
  };
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (!buffer) {
      const joined = new Uint8Array(head.length + value.length);
      joined.set(head); joined.set(value, head.length); head = joined;
      const at = indexOf(head, [0x61, 0x76, 0x63, 0x43]); // avcC
      if (at < 0 || at + 8 > head.length) continue;
      const name = [...head.slice(at + 5, at + 8)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      buffer = source.addSourceBuffer(`video/mp4; codecs="avc1.${name}"`);
      await append(head);
    } else await append(value);
    if (player.currentTime > 2 * KEPT_S && !buffer.updating) {  // of an endless video
      buffer.remove(0, player.currentTime - KEPT_S);
      await new Promise((gone) => buffer.addEventListener("updateend", gone, { once: true }));
    }
    player.play().catch(() => {});
  }
  if (!buffer || source.readyState !== "open") return false;
  source.endOfStream();
  return true;
}

function indexOf(data, bytes) {
  for (let i = 0; i + bytes.length <= data.length; i++) if (bytes.every((byte, j) => data[i + j] === byte)) return i;
  return -1;
}

function drawActions() {
  const video = state.current, done = video.status === "completed", path = `/v1/videos/${video.id}`;
  const runs = video.request.live && video.status === "in_progress";
  $("direct").hidden = $("end").hidden = !runs;
  $("extend").hidden = runs;
  $("extend").disabled = !done;
  $("cancel").disabled = done || video.status === "failed";
  const content = `${path}/content`;
  for (const [id, href, name] of [["download", content, `${video.id}.mp4`], ["gif", `${content}?variant=gif`, `${video.id}.gif`],
    ["webm", `${content}?variant=webm`, `${video.id}.webm`], ["json", path, `${video.id}.json`], ["plan", `${path}/plan`, `${video.id}.safetensors`]]) {
    $(id).hidden = !done;
    $(id).href = href;
    $(id).download = name;
  }
}

function reopen() {
  const own = state.current.request;
  $("model").value = own.model; chosen();
  state.shots = (own.shots || []).slice(1).map((shot) => ({ ...shot }));
  $("prompt").value = own.shots ? own.shots[0].prompt : own.prompt;
  $("seconds").value = own.shots ? own.shots[0].seconds : own.seconds;
  $("seed").value = own.seed; $("loop").checked = own.loop;
  for (const name of SAMPLING) $(`s-${name}`).value = own[name] ?? "";
  drawShots();
  $("prompt").focus();
}

function copied(kind) {
  const own = Object.fromEntries(Object.entries(state.current.request).filter(([, value]) => value !== null && value !== false));
  const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;
  if (kind === "curl") return `curl ${location.origin}/v1/videos -H 'Content-Type: application/json' -d ${quoted(JSON.stringify(own))}`;
  if (kind === "python") {
    const { model, prompt: text, seconds, ...rest } = own;
    return `from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(`${location.origin}/v1`)}, api_key="none")\n` +
      `video = client.videos.create_and_poll(model=${JSON.stringify(model)}, prompt=${JSON.stringify(text)}, seconds="${seconds}", extra_body=${JSON.stringify(rest).replaceAll(":true", ":True")})\n` +
      `client.videos.download_content(video.id).write_to_file("video.mp4")`;
  }
  const { prompt: text, shots, extends: _, remixed_from_video_id: __, size, ...flags } = own;
  const board = shots ? shots.map((shot) => `[${shot.seconds}s: ${shot.prompt}]`).join(" ") : text;
  if (shots) delete flags.seconds;
  const given = Object.entries(flags).map(([name, value]) => `--${name.replaceAll("_", "-")}${value === true ? "" : ` ${value}`}`);
  return `dicode generate ${quoted(board)} ${given.join(" ")} -o video.mp4`;
}

// ---- the gallery

async function refresh(older = false) {
  const query = older && state.oldest ? `&after=${state.oldest}` : "";
  const page = await call(`/v1/videos?limit=24${query}`);
  const items = page.data.map((video) => {
    const item = document.createElement("li"), button = document.createElement("button"), text = document.createElement("span");
    button.type = "button";
    text.textContent = video.prompt || (video.request.shots || []).map((shot) => shot.prompt).join(" · ") || "a given video";
    if (video.status === "completed") {
      const image = new Image();
      image.src = `/v1/videos/${video.id}/content?variant=thumbnail`; image.alt = ""; image.loading = "lazy";
      button.append(image);
    } else {
      const none = document.createElement("div");
      none.className = "none"; none.textContent = video.status.replace("_", " ");
      button.append(none);
    }
    button.append(text);
    button.onclick = () => { show([video]); scrollTo({ top: 0 }); };
    item.append(button);
    return item;
  });
  if (older) $("gallery").append(...items); else $("gallery").replaceChildren(...items);
  state.oldest = page.last_id;
  $("older").hidden = !page.has_more;
}

// ---- the rest

function chosen() {
  const name = $("model").value, model = state.models.find((own) => own.id === name);
  $("about").textContent = SAYS[name] || "Text to video with a language model.";
  $("loop-label").hidden = $("last-drop").hidden = !model.loops;
  $("examples").replaceChildren(...(EXAMPLES[name] || []).map((text) => {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = text;
    button.onclick = () => { $("prompt").value = text; $("seconds").value = name === "blocks" && /jump|spin/.test(text) && !/quickly/.test(text) ? 6 : 4; };
    return button;
  }));
}

function keys(event) {
  if (event.target.closest("input, textarea, select, button, a, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
  const player = $("stage").querySelector("video"), model = state.models.find((own) => own.id === state.current?.model);
  if (!player || !model) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === " ") { if (player.paused) player.play().catch(() => {}); else player.pause(); }
  else if (step) { player.pause(); player.currentTime = Math.max(0, player.currentTime + step / model.fps); }
  else if (event.key.toLowerCase() === "r") again(state.current, { seed: Math.floor(Math.random() * 1e9), reroll_from: null, reroll_seed: null, reroll_clips: null });
  else if (event.key.toLowerCase() === "e") extend();
  else return;
  event.preventDefault();
}

function droppable(label, input) {
  label.ondragover = (event) => { event.preventDefault(); label.classList.add("over"); };
  label.ondragleave = () => label.classList.remove("over");
  label.ondrop = (event) => {
    event.preventDefault();
    label.classList.remove("over");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change"));
  };
}

async function start() {
  $("sampling").innerHTML = SAMPLING.map((name) => `<label>--${name.replaceAll("_", "-")}<input id="s-${name}" type="number" step="any" min="0"></label>`).join("");
  state.models = (await call("/v1/models")).data;
  $("model").replaceChildren(...state.models.map((own) => new Option(own.id, own.id)));
  chosen();
  $("prompt").value = (EXAMPLES[state.models[0].id] || [""])[0];
  $("seconds").value = state.models[0].id === "blocks" ? 6 : 4;
  $("model").onchange = chosen;
  $("make").onsubmit = submit;
  $("four").onclick = four;
  $("add-shot").onclick = () => { state.shots.push({ prompt: "", seconds: 2 }); drawShots(); $("shots").lastElementChild.querySelector("input").focus(); };
  $("extend").onclick = extend;
  $("live").onclick = live;
  $("direct").onclick = () => direct({ prompt: $("more").value });
  $("end").onclick = () => direct({ end: true });
  $("more").onkeydown = (event) => { if (event.key === "Enter" && !$("direct").hidden) direct({ prompt: $("more").value }); };
  $("cancel").onclick = () => attempt(() => call(`/v1/videos/${state.current.id}/cancel`, { method: "POST" }));
  $("reopen").onclick = reopen;
  $("older").onclick = () => refresh(true);
  for (const button of document.querySelectorAll("[data-copy]")) button.onclick = async () => {
    await navigator.clipboard.writeText(copied(button.dataset.copy));
    $("state").textContent = "Copied.";
  };
  droppable($("first-drop"), $("first"));
  droppable($("last-drop"), $("last"));
  droppable($("own-drop"), $("own"));
  $("own").onchange = reconstruct;
  document.addEventListener("keydown", keys);
  await refresh();
  const linked = location.hash.slice(1);
  if (/^video_[0-9a-f]{32}$/.test(linked)) { const video = await attempt(() => call(`/v1/videos/${linked}`)); if (video) show([video]); }
}

attempt(start);
