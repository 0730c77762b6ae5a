// A video on the page: as it grows, and a given one beside what its tokens hold.

const KEPT_S = 60;  // of an endless video, to go back in

// Fragmented MP4 as it is written, whose codec is named in its first bytes; true once all of it is there.
export async function play(player, path, signal) {
  if (!("MediaSource" in window)) return false;
  const source = new MediaSource();
  const address = URL.createObjectURL(source);
  player.src = address;
  await new Promise((opened) => source.addEventListener("sourceopen", opened, { once: true }));
  URL.revokeObjectURL(address);
  const response = await fetch(path, { signal });
  if (!response.ok) return false;
  const reader = response.body.getReader();
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
    if (player.autoplay) player.play().catch(() => {});
  }
  if (!buffer || source.readyState !== "open") return false;
  source.endOfStream();
  return true;
}

function indexOf(data, bytes) {
  for (let i = 0; i + bytes.length <= data.length; i++) if (bytes.every((byte, j) => data[i + j] === byte)) return i;
  return -1;
}

// What was given, over what its tokens hold, up to a slider.
export function compare(video, player, stage) {
  if (!video.request.reconstructs || stage.querySelector(".both")) return;
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
  if (player.autoplay) player.play().catch(() => {});
}
