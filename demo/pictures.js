// A picture as the student was trained to see it: upright, on white, resized by Pillow's filters, normalised.
// Pillow is copied to the bit (its Resample.c, for 8 bits): a browser's own resizing would give other embeddings.

const PRECISION = 22; // bits behind the point of a weight, as in Pillow
const STRIP = 256; // rows read from the canvas at a time, so that a photo of a phone fits its memory
const MOST_PIXELS = 50_000_000;
const LONGEST_SIDES = 200; // how many times the longer side is the shorter one, at most

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// Pillow's numbers of its filters -> [half width, weight at a distance].
const FILTERS = {
  1: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)], // Lanczos
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))], // bilinear
  3: [2, cubic],
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)], // box
  5: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(x * Math.PI)))], // Hamming
};

// For each of `to` output pixels: where its inputs start, and their weights as whole numbers.
function weightsOf(from, to, resample) {
  if (!FILTERS[resample]) throw new Error(`This page cannot resize as the student needs it (Pillow's filter ${resample}).`);
  const [halfWidth, weight] = FILTERS[resample];
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = halfWidth * stretch;
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const values = [];
    let total = 0;
    for (let x = start; x < end; x++) {
      values.push(weight((x - center + 0.5) * (1 / stretch)));
      total += values.at(-1);
    }
    return {
      start,
      weights: Int32Array.from(values, (value) => {
        const part = (total ? value * (1 / total) : value) * (1 << PRECISION);
        return Math.trunc(part < 0 ? part - 0.5 : part + 0.5);
      }),
    };
  });
}

const clip = (sum) => Math.min(255, Math.max(0, sum >> PRECISION));

// Rows of pixels with `stride` bytes each, of which the first three are the colours -> [count, weights.length, 3].
function across(source, width, count, stride, weights) {
  const pixels = new Uint8Array(count * weights.length * 3);
  let to = 0;
  for (let row = 0; row < count; row++) {
    for (const { start, weights: own } of weights) {
      let red = 1 << (PRECISION - 1);
      let [green, blue] = [red, red];
      let at = stride * (row * width + start);
      for (let i = 0; i < own.length; i++, at += stride) {
        red += source[at] * own[i];
        green += source[at + 1] * own[i];
        blue += source[at + 2] * own[i];
      }
      pixels[to++] = clip(red);
      pixels[to++] = clip(green);
      pixels[to++] = clip(blue);
    }
  }
  return pixels;
}

// [height, width, 3] -> [weights.length, width, 3].
function down(source, width, weights) {
  const pixels = new Uint8Array(weights.length * width * 3);
  weights.forEach(({ start, weights: own }, y) => {
    for (let x = 0; x < 3 * width; x++) {
      let sum = 1 << (PRECISION - 1);
      for (let i = 0; i < own.length; i++) sum += source[(start + i) * 3 * width + x] * own[i];
      pixels[y * 3 * width + x] = clip(sum);
    }
  });
  return pixels;
}

// A picture {width, height, rows(y, count) -> RGBA bytes} as RGB bytes of another size [height, width, 3].
export function resize(picture, width, height, resample) {
  const isTall = picture.height > 100 * picture.width && height < picture.height; // Pillow then begins with the height
  const first = weightsOf(picture.width, isTall ? picture.width : width, resample);
  const narrow = new Uint8Array(picture.height * first.length * 3);
  for (let y = 0; y < picture.height; y += STRIP) {
    const count = Math.min(STRIP, picture.height - y);
    narrow.set(across(picture.rows(y, count), picture.width, count, 4, first), y * first.length * 3);
  }
  const low = down(narrow, first.length, weightsOf(picture.height, height, resample));
  return isTall ? across(low, picture.width, height, 3, weightsOf(picture.width, width, resample)) : low;
}

// `pixel_values` [3, H, W] of a picture, by the settings of preprocessor_config.json.
export function pixelValues(picture, settings) {
  const { width, height } = settings.size;
  const pixels = resize(picture, width, height, settings.resample);
  const values = new Float32Array(3 * height * width);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < height * width; i++) {
      const value = pixels[3 * i + channel] * settings.rescale_factor;
      values[channel * height * width + i] = (value - settings.image_mean[channel]) / settings.image_std[channel];
    }
  }
  return values;
}

// Decodes a file by the browser: upright by its EXIF tag, on white; colour profiles are not applied.
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("This file is no picture that this browser can read (PNG, JPEG, WebP, GIF or AVIF).");
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) throw new Error(`The picture has ${width} x ${height} pixels, more than 50 million.`);
  if (Math.max(width, height) > LONGEST_SIDES * Math.min(width, height)) {
    throw new Error(`The picture has ${width} x ${height} pixels: its sides may be as 1 to ${LONGEST_SIDES} at most.`);
  }
  const canvas = new OffscreenCanvas(width, Math.min(STRIP, height));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return {
    width,
    height,
    bitmap,
    rows(y, count) {
      context.fillStyle = "#ffffff";
      context.fillRect(0, 0, width, count);
      context.drawImage(bitmap, 0, y, width, count, 0, 0, width, count);
      return context.getImageData(0, 0, width, count).data;
    },
  };
}
