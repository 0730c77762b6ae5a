// What all parts of the page share.

export const $ = (id) => document.getElementById(id);

// base: the video whose settings are used, images and rerolled clips among them; shots: none, or two and more
export const state = { models: [], shots: [], shown: [], current: null, oldest: null, base: null };
