// Files that go with a message: images for models that see, and all others as text.

import { bytes } from "../drawing.js";

export const MOST_FILES = 20;
const MOST_OF_TEXT = 1 << 20; // bytes: some 300,000 tokens
const MOST_OF_IMAGE = 40 << 20;
const LARGEST_SIDE = 2048; // pixels: engines make images smaller anyway

/** What a file is to a message. Throws an Error that says why it cannot be one. */
export async function attached(file) {
  if (file.type.startsWith("image/") && file.type !== "image/svg+xml") return image(file);
  if (file.size > MOST_OF_TEXT) {
    throw new Error(`${file.name} has ${bytes(file.size)}; a file may have up to ${bytes(MOST_OF_TEXT)} of text.`);
  }
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (text.includes("\0")) throw new TypeError();
    return { kind: "text", name: file.name, text: text.replace(/\r\n?/g, "\n") };
  } catch {
    throw new Error(`${file.name} is neither text nor an image that this browser knows.`);
  }
}

/** Engines read JPEG and PNG only: whatever else the browser knows is made one of these. */
async function image(file) {
  if (file.size > MOST_OF_IMAGE) {
    throw new Error(`${file.name} has ${bytes(file.size)}; an image may have up to ${bytes(MOST_OF_IMAGE)}.`);
  }
  const name = file.name || "image";
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    throw new Error(`${name} is no image that this browser can read.`);
  }
  const { width, height } = picture;
  const scale = Math.min(1, LARGEST_SIDE / Math.max(width, height));
  if (scale === 1 && ["image/png", "image/jpeg"].includes(file.type))
    return { kind: "image", name, blob: file.slice(0, file.size, file.type) };
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [
    Math.max(1, Math.round(width * scale)),
    Math.max(1, Math.round(height * scale)),
  ];
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  picture.close();
  const type = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.9));
  return { kind: "image", name, blob };
}
