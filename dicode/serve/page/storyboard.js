// The storyboard: a card a shot, in order, as wide as it is long, with the key frames that came of it.

import { $, state } from "./state.js";

export const clipS = () => state.models.find((own) => own.id === $("model").value)?.clip_s || 2;

// One card a shot, as wide as it is long; the prompt box is the only shot where there are no cards.
export function drawShots() {
  const several = state.shots.length > 0, clip = clipS();
  $("prompt").closest("label").hidden = $("examples").hidden = $("seconds-label").hidden = several;
  $("prompt").required = !several;
  $("shots").replaceChildren(...state.shots.map((shot, i) => {
    const item = document.createElement("li");
    item.draggable = true;
    item.innerHTML = `<label>Shot ${i + 1}<input type="text" maxlength="4000" required placeholder="What happens in it"></label>
      <label><span></span><input type="range" min="${clip}" max="${10 * clip}" step="${clip}"></label>
      <div class="row"><button type="button" aria-label="Shot ${i + 1} earlier">←</button><button type="button" aria-label="Shot ${i + 1} later">→</button>
      <button type="button" aria-label="Remove shot ${i + 1}">×</button></div><div class="strip"></div>`;
    const [text, seconds] = item.querySelectorAll("input");
    const [earlier, later, gone] = item.querySelectorAll("button");
    text.value = shot.prompt; seconds.value = shot.seconds;
    text.oninput = () => { shot.prompt = text.value; };
    seconds.oninput = () => {
      shot.seconds = Number(seconds.value);
      item.querySelector("span").textContent = `${shot.seconds} s`;
      item.style.flexGrow = item.style.minWidth = "";
      item.style.width = `${9 + 2 * shot.seconds / clip}rem`;  // as long as it lasts
    };
    seconds.oninput();
    seconds.draggable = true;  // the slider, not the card
    seconds.ondragstart = (event) => { event.preventDefault(); event.stopPropagation(); };
    earlier.onclick = () => moveShot(i, i - 1);
    later.onclick = () => moveShot(i, i + 1);
    gone.onclick = () => removeShot(i);
    item.ondragstart = (event) => event.dataTransfer.setData("text/plain", String(i));
    item.ondragover = (event) => { event.preventDefault(); item.classList.add("over"); };
    item.ondragleave = () => item.classList.remove("over");
    item.ondrop = (event) => { event.preventDefault(); moveShot(Number(event.dataTransfer.getData("text/plain")), i); };
    return item;
  }));
  drawStrips();
}

export function addShot() {
  if (!state.shots.length) {  // what the prompt box holds is the first
    const clip = clipS(), whole = Math.max(1, Math.ceil(Number($("seconds").value) / clip)) * clip;
    state.shots.push({ prompt: $("prompt").value, seconds: whole });
  }
  state.shots.push({ prompt: "", seconds: clipS() });
  drawShots();
  $("shots").lastElementChild.querySelector("input").focus();
}

export function removeShot(i) {
  state.shots.splice(i, 1);
  if (state.shots.length === 1) {
    const [{ prompt, seconds }] = state.shots.splice(0);
    $("prompt").value = prompt; $("seconds").value = seconds;
  }
  drawShots();
}

function moveShot(from, to) {
  if (!(from in state.shots) || to < 0 || to >= state.shots.length) return;
  state.shots.splice(to, 0, ...state.shots.splice(from, 1));
  drawShots();
}

// The key frames of the video that is shown, under the shots that it was made of.
export function drawStrips() {
  const made = state.current?.request.shots, clip = clipS();
  if (!made || made.length !== state.shots.length) return;
  let first = 0;
  made.forEach((shot, i) => {
    const count = Math.ceil(shot.seconds / clip - 1e-6), start = first;
    first += count;
    if (shot.prompt !== state.shots[i].prompt) return;  // moved or written anew since
    $("shots").children[i].querySelector(".strip").replaceChildren(...Array.from({ length: count }, (_, k) => {
      const frame = document.createElement("div");
      frame.style.backgroundImage = state.picture ? `url(${state.picture})` : "";
      frame.style.backgroundPositionX = `${-48 * (start + k)}px`;
      return frame;
    }));
  });
}
