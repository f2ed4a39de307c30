// Files and pixels: the settings in a PNG's text, base64, canvases. Knows formats; no requests.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const KEY = "minidalle";

/** The settings in a PNG's text, or null where there are none. */
export function settingsOf(buffer) {
  const bytes = new Uint8Array(buffer);
  if (!SIGNATURE.every((value, i) => bytes[i] === value)) return null;
  const view = new DataView(buffer);
  const latin = new TextDecoder("latin1");
  for (let at = 8; at + 8 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = latin.decode(bytes.subarray(at + 4, at + 8));
    const content = bytes.subarray(at + 8, at + 8 + length);
    const end = content.indexOf(0);
    if (kind === "tEXt" && latin.decode(content.subarray(0, end)) === KEY) {
      return parsed(latin.decode(content.subarray(end + 1)));
    }
    at += length + 12;
  }
  return null;
}

function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

/** A file of base64. */
export function blobOf(base64, type = "image/png") {
  const text = atob(base64);
  return new Blob([Uint8Array.from(text, (letter) => letter.charCodeAt(0))], { type });
}

/** The base64 of a file. */
export async function base64Of(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

/** The middle of a file's image on a canvas of a size, which it fills. */
export async function scaled(blob, width, height) {
  const bitmap = await createImageBitmap(blob);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  return pngOf(canvas);
}

/** A canvas as a PNG. */
export function pngOf(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
