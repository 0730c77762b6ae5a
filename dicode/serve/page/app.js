// The page of `dicode serve`. A video appears clip by clip while it is rendered; all state is the server's.

import { copied } from "./copy.js";
import { compare, play } from "./player.js";
import { $, state } from "./state.js";
import { addShot, clipS, drawShots, drawStrips, removeShot } from "./storyboard.js";

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
  "decoder_guidance", "decoder_temperature", "guidance_rescale", "eta", "motion_scale", "dead_band", "motion_tokens"];
const LOOK_MS = 1000;  // between looks at a video that waits
const MOST_CONVERTED_S = 120;  // of a gif or webm
const CALM = matchMedia("(prefers-reduced-motion: reduce)");

async function call(path, options = {}) {
  const response = await fetch(path, options).catch(() => { throw new Error("The server does not answer; see whether it runs, and try again."); });
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
  const values = { model: $("model").value, seed: Number($("seed").value), prompt: $("prompt").value, seconds: Number($("seconds").value),
    shots: null, loop: $("loop").checked && !$("loop-label").hidden, live: false, joins: $("s-joins").value || null };
  if (state.shots.length) Object.assign(values, { prompt: "", shots: state.shots.map((shot) => ({ ...shot })) });
  for (const name of SAMPLING) values[name] = $(`s-${name}`).value === "" ? null : Number($(`s-${name}`).value);
  return values;
}

async function make(changes = {}) {
  const values = { ...request(), ...changes };
  for (const [name, input] of [["input_reference", $("first")], ["last_image", $("last")]]) {
    if (input.files[0] && !input.closest("label").hidden) values[name] = await dataUrl(input.files[0]);
  }
  return call(state.base ? `/v1/videos/${state.base.id}/remix` : "/v1/videos", json(values));
}

const dataUrl = (file) => new Promise((read, failed) => {
  const reader = new FileReader();
  Object.assign(reader, { onload: () => read(reader.result), onerror: () => failed(new Error(`${file.name} cannot be read; choose it again`)) });
  reader.readAsDataURL(file);
});

async function attempt(action) {
  $("error").textContent = "";
  try { return await action(); } catch (error) { $("error").textContent = error.message; return null; }
}

function nextSeed() { if (!$("lock").checked) $("seed").value = Math.floor(Math.random() * 1e9); }

async function submit(event) {
  event.preventDefault();
  const video = await attempt(() => make());
  if (video) { show([video]); nextSeed(); await attempt(refresh); }
}

async function four() {
  const first = Number($("seed").value);
  const videos = await attempt(() => Promise.all([0, 1, 2, 3].map((i) => make({ seed: first + i }))));
  if (videos) { show(videos); nextSeed(); await attempt(refresh); }
}

async function live() {
  const prompt = state.shots.length ? state.shots[0].prompt : $("prompt").value;
  const rest = { shots: null, loop: false, reroll_from: null, reroll_seed: null, reroll_clips: null };
  const video = await attempt(() => make({ ...rest, prompt, live: true, seconds: 3600 }));
  if (video) { show([video]); nextSeed(); $("more").focus(); }
}

async function direct(values) {
  if (await attempt(() => call(`/v1/videos/${state.current.id}/direct`, json(values)))) $("more").value = "";
}

const json = (values) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) });

async function again(video, changes) {
  if (video.request.reconstructs) return;
  const made = await attempt(() => call(`/v1/videos/${video.id}/remix`, json(changes)));
  if (made) { show([made]); await attempt(refresh); }
}

async function reconstruct() {
  const file = $("own").files[0];
  if (!file) return;
  const form = new FormData();
  form.append("model", $("model").value);
  form.append("video", file);
  const video = await attempt(() => call("/v1/videos/reconstructions", { method: "POST", body: form }));
  $("own").value = "";
  if (video) { show([video]); await attempt(refresh); }
}

async function extend() {
  const video = state.current;
  if (!video) return;
  const text = $("more").value.trim() || video.prompt || (video.request.shots || []).at(-1)?.prompt;
  const made = await attempt(() => call("/v1/videos/extensions", json({ prompt: text || "it goes on", seconds: 2, model: video.model, video: { id: video.id } })));
  if (made) { show([made]); await attempt(refresh); }
}

// ---- showing

function show(videos) {
  const before = state.current?.id;
  for (const own of state.shown) own.stop();
  $("stage").classList.toggle("four", videos.length > 1);
  $("stage").replaceChildren();
  $("frames").replaceChildren();
  state.current = videos[0];
  state.shown = videos.map(watch);
  $("actions").hidden = false;
  drawActions();
  history.replaceState(null, "", videos.length === 1 ? `#${videos[0].id}` : "#");
  if (before !== videos[0].id) $("stage").scrollIntoView({ block: "nearest", behavior: CALM.matches ? "auto" : "smooth" });
}

function watch(video) {
  const player = document.createElement("video");
  Object.assign(player, { controls: true, muted: true, playsInline: true, autoplay: true, loop: !video.request.live && !CALM.matches });
  player.setAttribute("aria-label", `Video: ${video.prompt || "of several shots"}`);
  player.onfocus = player.onclick = () => { state.current = video; mark(player); drawActions(); say(video); };
  $("stage").append(player);
  if (video === state.current) mark(player);
  const path = `/v1/videos/${video.id}`;
  if (video.status === "completed") {
    player.src = `${path}/content`;
    drawFrames(video);
    compare(video, player, $("stage"));
    say(video);
    return { stop() {} };
  }
  const ending = new AbortController();
  let events = null, streaming = null;
  const update = async (changes = {}) => {
    try { Object.assign(video, await call(path), changes); } catch { return; }  // the next look will do
    say(video);
    if (video.id === state.current?.id) drawActions();
  };
  const finished = async () => { events.close(); await update(); refresh().catch(() => {}); };
  const follow = () => {
    events = new EventSource(`${path}/events`);
    events.addEventListener("queued", () => { streaming = null; update(); });  // anew where its worker died
    for (const kind of ["started", "rendering"]) events.addEventListener(kind, () => update());
    events.addEventListener("clip", async () => {
      streaming ??= play(player, `${path}/stream`, ending.signal).catch(() => false);
      await update();
      drawFrames(video);
    });
    events.addEventListener("completed", async () => {
      await finished();
      drawFrames(video);
      if (!await streaming && !ending.signal.aborted) player.src = `${path}/content`;
      compare(video, player, $("stage"));
    });
    events.addEventListener("failed", finished);
    events.addEventListener("deleted", () => { events.close(); $("state").textContent = "This video was deleted."; });
    events.onopen = () => say(video);
    events.onerror = () => {  // the browser tries again by itself, but not where it was refused
      if (video.id === state.current?.id) $("state").textContent = "The server does not answer; waiting for it.";
      if (events.readyState === EventSource.CLOSED) setTimeout(() => { if (!ending.signal.aborted) show([video]); }, 2000);
    };
  };
  (async () => {  // browsers have six connections to a server, in all tabs: none is kept while others are before it
    while (video.status === "queued" && video.position > 0 && !ending.signal.aborted) {
      await new Promise((over) => setTimeout(over, LOOK_MS));
      await update();
    }
    if (!ending.signal.aborted) follow();
  })();
  say(video);
  return { stop() { events?.close(); ending.abort(); } };
}

function mark(player) {
  for (const own of $("stage").querySelectorAll("video")) own.classList.toggle("current", own === player);
}

function say(video) {
  if (video.id !== state.current?.id) return;
  const left = video.seconds_left ? `, about ${Math.ceil(video.seconds_left)} s left` : "";
  const texts = {
    queued: `${video.position ? `Waiting; ${video.position} before it` : "Next in the queue"}${left}.`,
    in_progress: video.request.live ? "Live: what is typed takes over at the next key frame." : `Rendering: ${video.progress} %${left}.`,
    completed: video.request.reconstructs ? `Left what was given, right what ${numbers(video)} of deep tokens hold of it.`
      : `${video.seconds} s, seed ${video.request.seed}, from ${numbers(video)} of deep tokens.`,
    failed: video.error?.code === "cancelled" ? "Cancelled." : `Failed: ${video.error?.message}`,
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
    if (video.id !== state.current?.id) return;
    state.picture = picture.src;
    drawStrips();
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

function drawActions() {
  const video = state.current, done = video.status === "completed", path = `/v1/videos/${video.id}`;
  const runs = video.request.live && video.status === "in_progress";
  $("direct").hidden = $("end").hidden = !runs;
  $("extend").hidden = runs;
  $("extend").disabled = !done;
  $("extend").textContent = `Extend by ${clipS()} s`;
  $("cancel").hidden = done || video.status === "failed";
  $("reopen").hidden = video.request.reconstructs;
  $("link").href = `#${video.id}`;
  const content = `${path}/content`;
  for (const [id, href, name] of [["download", content, `${video.id}.mp4`], ["gif", `${content}?variant=gif`, `${video.id}.gif`],
    ["webm", `${content}?variant=webm`, `${video.id}.webm`], ["json", path, `${video.id}.json`], ["plan", `${path}/plan`, `${video.id}.safetensors`]]) {
    $(id).hidden = !done || (id === "plan" && video.request.live) || (["gif", "webm"].includes(id) && Number(video.seconds) > MOST_CONVERTED_S);
    $(id).href = href;
    $(id).download = name;
  }
}

// All settings of a video: those the page has no field for, images and rerolled clips, come with the video itself.
function reopen() {
  const own = state.current.request;
  if (state.models.some((model) => model.id === own.model)) $("model").value = own.model;
  chosen();
  state.base = state.current;
  state.shots = (own.shots || []).map((shot) => ({ ...shot }));
  $("prompt").value = own.prompt;
  if (!own.live) $("seconds").value = own.seconds;
  $("seed").value = own.seed; $("loop").checked = own.loop; $("s-joins").value = own.joins ?? "";
  for (const name of SAMPLING) $(`s-${name}`).value = own[name] ?? "";
  $("sampling").closest("details").open ||= [...SAMPLING, "joins"].some((name) => own[name] !== undefined);
  $("first").value = $("last").value = "";
  if (state.shots.length === 1) removeShot(1);
  drawShots();
  drawBase();
  (state.shots.length ? $("shots").querySelector("input") : $("prompt")).focus();
}

function drawBase() {
  const own = state.base?.request;
  $("base").hidden = !own;
  if (!own) return;
  const names = { image: "its first image", last_image: "its last image", continued: "the video it goes on from" };
  const kept = (own.given || []).map((name) => names[name]).filter(Boolean);
  if (own.reroll_from !== null) {
    const first = own.reroll_from + 1, last = own.reroll_from + own.reroll_clips;
    kept.push(`${own.reroll_clips === null ? `clip ${first} on` : first === last ? `clip ${first}` : `clips ${first} to ${last}`} with seed ${own.reroll_seed}`);
  }
  if (own.size) kept.push(`size ${own.size}`);
  $("base-text").textContent = `Settings of “${(own.prompt || own.shots?.[0].prompt || "").slice(0, 60)}”${kept.length ? `, with ${kept.join(", ")}` : ""}.`;
}

// ---- the gallery

async function refresh(older = false) {
  const query = older === true && state.oldest ? `&after=${state.oldest}` : "";
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
    button.onclick = () => show([video]);
    item.append(button);
    return item;
  });
  if (older === true) $("gallery").append(...items); else $("gallery").replaceChildren(...items);
  state.oldest = page.last_id;
  $("older").hidden = !page.has_more;
}

// ---- the rest

function chosen() {
  const name = $("model").value, model = state.models.find((own) => own.id === name);
  state.base = null;
  drawBase();
  drawShots();
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
  input.addEventListener("change", () => label.classList.toggle("given", input.files.length > 0));
  label.ondragleave = () => label.classList.remove("over");
  label.ondrop = (event) => {
    event.preventDefault();
    label.classList.remove("over");
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change"));
  };
}

// An image is shown once it is chosen, and can be taken back.
function pictured(input) {
  const image = new Image(), gone = document.createElement("button");
  image.alt = ""; image.hidden = gone.hidden = true;
  Object.assign(gone, { type: "button", textContent: "Remove" });
  gone.setAttribute("aria-label", `Remove the ${input.id} image`);
  const draw = () => {
    const [file] = input.files;
    image.hidden = gone.hidden = !file;
    if (image.src) URL.revokeObjectURL(image.src);
    if (file) image.src = URL.createObjectURL(file);
  };
  gone.onclick = () => { input.value = ""; draw(); };
  input.addEventListener("change", draw);
  input.closest("label").after(image, gone);
}

async function start() {
  $("sampling").innerHTML = `<label>--joins<select id="s-joins"><option value=""></option><option>chained</option><option>parallel</option></select></label>` + SAMPLING.map((name) => `<label>--${name.replaceAll("_", "-")}<input id="s-${name}" type="number" step="any" min="0"></label>`).join("");
  state.models = (await call("/v1/models")).data;
  $("model").replaceChildren(...state.models.map((own) => new Option(own.id, own.id)));
  chosen();
  $("prompt").value = (EXAMPLES[state.models[0].id] || [""])[0];
  $("seconds").value = state.models[0].id === "blocks" ? 6 : 4;
  $("model").onchange = chosen;
  $("make").onsubmit = submit;
  $("four").onclick = four;
  $("add-shot").onclick = addShot;
  $("unbase").onclick = () => { state.base = null; drawBase(); };
  $("delete").onclick = remove;
  $("extend").onclick = extend;
  $("live").onclick = live;
  $("direct").onclick = () => direct({ prompt: $("more").value });
  $("end").onclick = () => direct({ end: true });
  $("more").onkeydown = (event) => { if (event.key === "Enter" && !$("direct").hidden) direct({ prompt: $("more").value }); };
  $("cancel").onclick = () => attempt(() => call(`/v1/videos/${state.current.id}/cancel`, { method: "POST" }));
  $("reopen").onclick = reopen;
  $("older").onclick = () => attempt(() => refresh(true));
  for (const button of document.querySelectorAll("[data-copy]")) button.onclick = async () => {
    const video = state.current, model = state.models.find((own) => own.id === video.model);
    const text = copied(button.dataset.copy, video, model, location.origin, document.cookie.includes("dicode_key="));
    if (await attempt(() => navigator.clipboard.writeText(text).then(() => true, () => { throw new Error(text); }))) $("state").textContent = "Copied.";
  };
  droppable($("first-drop"), $("first"));
  droppable($("last-drop"), $("last"));
  droppable($("own-drop"), $("own"));
  pictured($("first"));
  pictured($("last"));
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => event.preventDefault());  // else the page is left for the file
  $("own").addEventListener("change", reconstruct);
  addEventListener("hashchange", linked);
  document.addEventListener("keydown", keys);
  await refresh();
  await linked();
}

async function linked() {
  const name = location.hash.slice(1);
  if (!/^video_[0-9a-f]{32}$/.test(name) || name === state.current?.id) return;
  const video = await attempt(() => call(`/v1/videos/${name}`));
  if (video) show([video]);
}

async function remove() {
  const video = state.current;
  if (!confirm("Delete this video?") || !await attempt(() => call(`/v1/videos/${video.id}`, { method: "DELETE" }))) return;
  for (const own of state.shown) own.stop();
  Object.assign(state, { shown: [], current: null });
  $("stage").replaceChildren(); $("frames").replaceChildren();
  $("actions").hidden = true;
  $("state").textContent = "Deleted.";
  history.replaceState(null, "", "#");
  await attempt(refresh);
}

attempt(start);
