// From a picture to the array that an exported model takes: pictures.py in JavaScript.
//
// A canvas resizes differently in every browser, and not like the transform the model was trained with. So the canvas
// only decodes here; `resized` computes what Pillow's antialiased resize computes, to the last bit. (From version 13 on,
// Pillow rounds pictures that are over twice as tall as wide in another order, and a few pixels differ.)

export const MAX_PIXELS = 64_000_000;
const MIN_SIDE = 8;
const PRECISION = 22; // bits after the point in Pillow's integer weights

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// Each of Pillow's filters: its support, and its weight at the distance x.
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
  bicubic: [2, (x) => bicubic(Math.abs(x))],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

function bicubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/**
 * Return the decoded picture of `file`; its size and depth are checked before it is decoded.
 *
 * One that is not opaque is refused: a canvas multiplies colours by alpha and loses what they were.
 */
export async function openPicture(file, maxPixels = MAX_PIXELS) {
  const { width, height } = await sizeOf(file);
  const size = `${file.name} has ${width}x${height} pixels`;
  if (width * height > maxPixels) throw new Error(`${size}; at most ${maxPixels / 1e6} million in all.`);
  if (Math.min(width, height) < MIN_SIDE) throw new Error(`${size}; at least ${MIN_SIDE}x${MIN_SIDE}.`);
  if (await isDeepPng(file)) throw new Error(`${file.name} has more than 8 bits a channel; scale it to 8 first.`);
  const picture = await decoded(file);
  if (!isOpaque(picture)) throw new Error(`${file.name} is transparent in places; save it without transparency first.`);
  return picture;
}

/** Return whether `file` is a PNG of 16 bits a channel: the depth is byte 24, in the header that comes first. */
async function isDeepPng(file) {
  const start = new Uint8Array(await file.slice(0, 25).arrayBuffer());
  return String.fromCharCode(...start.slice(1, 4)) === "PNG" && start[24] === 16;
}

function isOpaque({ data }) {
  for (let alpha = 3; alpha < data.length; alpha += 4) if (data[alpha] < 255) return false;
  return true;
}

async function decoded(file) {
  try {
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
    const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
    return context.getImageData(0, 0, canvas.width, canvas.height);
  } catch {
    throw new Error(`${file.name} cannot be decoded: it is damaged, or too large for this browser.`);
  }
}

async function sizeOf(file) {
  const image = new Image(); // reads the header; pixels are decoded only when they are drawn
  image.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject }));
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can read.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

/** Return what the model takes for `picture` (an ImageData): float32 (C, H, W), normalised; in-graph: uint8 (H, W, C). */
export function toArray(picture, { where, input_size: [channels, height, width], mean, std, ...config }) {
  const pixels = resized(channels === 1 ? grey(picture) : picture, width, height, channels, config);
  if (where === "in-graph") return pixels;
  const [scale, offset] = [Float32Array.from(std), Float32Array.from(mean)];
  const area = width * height;
  return Float32Array.from({ length: channels * area }, (_, index) => {
    const channel = Math.floor(index / area);
    const level = Math.fround(pixels[(index % area) * channels + channel] / 255);
    return Math.fround(level - offset[channel]) / scale[channel];
  });
}

/** Return the uint8 (H, W, C) centre of `picture`, its shorter side resized to floor(size / crop_pct). */
function resized(picture, width, height, channels, { interpolation, crop_pct, crop_mode }) {
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`This page cannot resize by "${interpolation}", only by ${Object.keys(FILTERS).join(", ")}.`);
  if (crop_mode !== "center") throw new Error(`This page cuts pictures out of the center, not by "${crop_mode}".`);
  const [wide, high] = resizedSize(picture, Math.floor(width / crop_pct), Math.floor(height / crop_pct));
  const columns = taps(picture.width, wide, roundHalfToEven((wide - width) / 2), width, filter);
  const rows = taps(picture.height, high, roundHalfToEven((high - height) / 2), height, filter);

  // As in Pillow: first along x, rounded to bytes, then along y; but only the rows and columns that the crop needs.
  const top = rows[0].first;
  const bottom = rows[height - 1].first + rows[height - 1].weights.length;
  const narrow = new Uint8ClampedArray((bottom - top) * width * channels);
  for (let y = top; y < bottom; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < channels; c++) {
        const start = (y * picture.width + columns[x].first) * 4 + c;
        narrow[((y - top) * width + x) * channels + c] = weighted(picture.data, start, 4, columns[x].weights);
      }
  const pixels = new Uint8ClampedArray(height * width * channels);
  for (let y = 0; y < height; y++)
    for (let i = 0; i < width * channels; i++) {
      const start = (rows[y].first - top) * width * channels + i;
      pixels[y * width * channels + i] = weighted(narrow, start, width * channels, rows[y].weights);
    }
  return new Uint8Array(pixels.buffer);
}

/** Return width and height after resizing, rounded as timm and torchvision round them. */
function resizedSize({ width, height }, wide, high) {
  if (wide === high) {
    const longer = Math.floor((wide * Math.max(width, height)) / Math.min(width, height));
    return width <= height ? [wide, longer] : [longer, wide];
  }
  const ratio = Math.min(width / wide, height / high);
  return [roundHalfToEven(width / ratio), roundHalfToEven(height / ratio)];
}

/** Return, for `count` outputs from `from` on, where their inputs begin and the integer weights of these. */
function taps(inputs, outputs, from, count, [support, weight]) {
  const scale = inputs / outputs;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: count }, (_, index) => {
    const centre = (from + index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support * stretch + 0.5));
    const last = Math.min(inputs, Math.trunc(centre + support * stretch + 0.5));
    const odds = Array.from({ length: last - first }, (_, i) => weight((i + first - centre + 0.5) * (1 / stretch)));
    const sum = odds.reduce((total, value) => total + value, 0);
    const unit = 2 ** PRECISION;
    return { first, weights: Int32Array.from(odds, (value) => (value / sum) * unit + (value < 0 ? -0.5 : 0.5)) };
  });
}

function weighted(bytes, start, step, weights) {
  let sum = 2 ** (PRECISION - 1);
  for (let i = 0; i < weights.length; i++) sum += bytes[start + i * step] * weights[i];
  return sum >> PRECISION;
}

/** Return `picture` with the luminance of ITU-R 601 in the place of red, as Pillow computes it. */
function grey({ data, width, height }) {
  const luminance = data.slice();
  for (let i = 0; i < data.length; i += 4)
    luminance[i] = (data[i] * 19595 + data[i + 1] * 38470 + data[i + 2] * 7471 + 0x8000) >> 16;
  return { data: luminance, width, height };
}

/** Round as Python does: a half to the even neighbour. */
function roundHalfToEven(x) {
  return x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

/** Return the probabilities of `logits`, which must be finite. */
export function softmax(logits) {
  if (!logits.every(Number.isFinite)) throw new Error("The model gives values that are not finite: it is damaged or untrained.");
  const best = Math.max(...logits);
  const odds = Array.from(logits, (logit) => Math.exp(logit - best));
  const sum = odds.reduce((total, value) => total + value, 0);
  return odds.map((value) => value / sum);
}
