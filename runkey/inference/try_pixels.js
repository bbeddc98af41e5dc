// What the page to try a model computes on pixels and boxes, in plain functions: the one
// preprocessing of runkey.inference.preprocess, non-maximum suppression, unpacking.

const PRECISION_BITS = 32 - 8 - 2; // of Pillow's fixed-point coefficients

/** Return the [height, width] to resize to, as runkey.data.augment.resized_size. */
export function resizedSize(height, width, shortSide, longSide) {
  const low = Math.min(height, width);
  const high = Math.max(height, width);
  let short = shortSide;
  if ((high / low) * short > longSide) short = Math.max(1, roundHalfEven((longSide * low) / high));
  const long = Math.min(Math.floor((short * high) / low), Math.max(longSide, short));
  return height <= width ? [short, long] : [long, short];
}

/** Round as Python does: halves go to the even number. */
function roundHalfEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/**
 * Return the weights by which source pixels along an axis become each output pixel.
 *
 * Pillow's antialiased bilinear filter (Resample.c): a triangle that is as wide as the scale, in
 * integers of 22 fractional bits.
 */
function coefficients(size, newSize) {
  const scale = size / newSize;
  const stretch = Math.max(scale, 1);
  const most = Math.ceil(stretch) * 2 + 1;
  const starts = new Int32Array(newSize);
  const counts = new Int32Array(newSize);
  const weights = new Int32Array(newSize * most);
  const real = new Float64Array(most);
  const inverse = 1 / stretch;
  for (let out = 0; out < newSize; out++) {
    const centre = (out + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - stretch + 0.5));
    const count = Math.min(size, Math.trunc(centre + stretch + 0.5)) - start;
    let sum = 0;
    for (let i = 0; i < count; i++) {
      const distance = Math.abs((i + start - centre + 0.5) * inverse);
      real[i] = distance < 1 ? 1 - distance : 0;
      sum += real[i];
    }
    for (let i = 0; i < count; i++) {
      const share = sum === 0 ? real[i] : real[i] / sum;
      weights[out * most + i] = Math.trunc(share * (1 << PRECISION_BITS) + 0.5);
    }
    starts[out] = start;
    counts[out] = count;
  }
  return { starts, counts, weights, most };
}

/**
 * Resize as PIL.Image.resize((newWidth, newHeight), BILINEAR) does 8-bit RGB: first along rows, then
 * along columns, rounded to 8 bits after each.
 *
 * @param {Uint8ClampedArray} rgba - [height, width, 4]; the fourth value is not read.
 * @returns {Uint8Array} planes [3, newHeight, newWidth]
 */
export function resize(rgba, height, width, newHeight, newWidth) {
  const half = 1 << (PRECISION_BITS - 1);
  const rows = new Uint8Array(3 * height * newWidth);
  const across = newWidth === width ? null : coefficients(width, newWidth);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < newWidth; x++) {
      let red = half;
      let green = half;
      let blue = half;
      const to = y * newWidth + x;
      if (across === null) {
        const from = 4 * (y * width + x);
        rows[to] = rgba[from];
        rows[to + height * newWidth] = rgba[from + 1];
        rows[to + 2 * height * newWidth] = rgba[from + 2];
        continue;
      }
      let from = 4 * (y * width + across.starts[x]);
      const first = x * across.most;
      for (let i = first; i < first + across.counts[x]; i++, from += 4) {
        const weight = across.weights[i];
        red += rgba[from] * weight;
        green += rgba[from + 1] * weight;
        blue += rgba[from + 2] * weight;
      }
      rows[to] = red >> PRECISION_BITS;
      rows[to + height * newWidth] = green >> PRECISION_BITS;
      rows[to + 2 * height * newWidth] = blue >> PRECISION_BITS;
    }
  }
  if (newHeight === height) return rows;
  const down = coefficients(height, newHeight);
  const planes = new Uint8Array(3 * newHeight * newWidth);
  for (let plane = 0; plane < 3; plane++) {
    for (let y = 0; y < newHeight; y++) {
      const first = y * down.most;
      for (let x = 0; x < newWidth; x++) {
        let sum = half;
        let from = (plane * height + down.starts[y]) * newWidth + x;
        for (let i = first; i < first + down.counts[y]; i++, from += newWidth) {
          sum += rows[from] * down.weights[i];
        }
        planes[(plane * newHeight + y) * newWidth + x] = sum >> PRECISION_BITS;
      }
    }
  }
  return planes;
}

/** Drop each detection that overlaps a better one of its class by more than `iou`; best first. */
export function suppress(detections, iou) {
  const kept = [];
  for (const one of detections) {
    if (!kept.some((other) => other.label === one.label && overlap(one.box, other.box) > iou)) {
      kept.push(one);
    }
  }
  return kept;
}

/** Return the intersection over union of two boxes [left, top, right, bottom]. */
function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
  return (width * height) / (area(a) + area(b) - width * height);
}

/** Return the bytes of a gzipped base64 text. */
export async function unpack(text) {
  const packed = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return why an image's bytes cannot be read as the model's; empty if they can. */
export function unreadable(bytes) {
  const isPng = [0x89, 0x50, 0x4e, 0x47].every((byte, i) => bytes[i] === byte);
  // The header says bit depth and colour type; a browser would cut the values to 8 bits.
  const isWideGrey = isPng && bytes[24] === 16 && (bytes[25] === 0 || bytes[25] === 4);
  return isWideGrey ? 'grey with 16 bits, which a browser cuts to 8; use `runkey predict`' : '';
}

/** Return EXIF's orientation, 1 to 8, of a WebP file, which browsers do not apply; else 1. */
export function webpOrientation(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const word = (at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  if (word(0) !== 'RIFF' || word(8) !== 'WEBP') return 1;
  for (let at = 12; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at + 4, true);
    if (word(at) === 'EXIF') {
      return tiffOrientation(bytes.subarray(at + 8, Math.min(bytes.length, at + 8 + size)));
    }
    at += 8 + size + (size % 2);
  }
  return 1;
}

function tiffOrientation(bytes) {
  const prefix = String.fromCharCode(...bytes.subarray(0, 4)) === 'Exif' ? 6 : 0;
  const view = new DataView(bytes.buffer, bytes.byteOffset + prefix, bytes.byteLength - prefix);
  try {
    const little = view.getUint8(0) === 0x49;
    const table = view.getUint32(4, little);
    for (let i = 0; i < view.getUint16(table, little); i++) {
      const entry = table + 2 + 12 * i;
      if (view.getUint16(entry, little) === 0x0112) {
        const value = view.getUint16(entry + 8, little);
        return value >= 1 && value <= 8 ? value : 1;
      }
    }
  } catch {
    // Damaged: as without it.
  }
  return 1;
}
