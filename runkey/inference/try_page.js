// The page to try a model: unpack runtime and model, detect, draw, and keep up with the controls.
// `resize`, `suppress` and the others are of try_pixels.js, which stands before this in the page.

const $ = (id) => document.getElementById(id);
const card = JSON.parse($('card').textContent);
const SMALLEST_SHOWN = 640; // pixels of the screen: a smaller image is enlarged

let session = null;
let shown = null; // { name, picture, height, width, detections, milliseconds }
const scores = card.classes.map((one) => one.score);

function say(text, isError = false) {
  $('status').textContent = text;
  $('status').classList.toggle('error', isError);
}

/** Start ONNX Runtime from what the page holds: no file is loaded. */
async function start() {
  const [code, wasm, model] = await Promise.all(
    ['runtime', 'wasm', 'model'].map((id) => unpack($(id).textContent)),
  );
  const address = URL.createObjectURL(new Blob([code], { type: 'text/javascript' }));
  const ort = await import(address);
  URL.revokeObjectURL(address);
  ort.env.wasm.wasmBinary = wasm.buffer;
  ort.env.wasm.numThreads = 1;
  const made = await ort.InferenceSession.create(model, { executionProviders: ['wasm'] });
  session = { ort, run: (feeds) => made.run(feeds), input: made.inputNames[0], outputs: made.outputNames };
  const [height, width] = resizedSize(3, 4, card.short_side, card.long_side);
  await compute(new Uint8Array(3 * height * width), height, width); // the first run takes longer
}

/** Run the network on the planes [3, height, width] of an image. */
function compute(planes, height, width) {
  return session.run({ [session.input]: new session.ort.Tensor('uint8', planes, [1, 3, height, width]) });
}

/** Decode an image file as runkey.inference.preprocess does: upright, 8-bit RGB, over white. */
async function decode(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const why = unreadable(bytes);
  if (why) throw new Error(why);
  const orientation = webpOrientation(bytes);
  const imageOrientation = orientation === 1 ? 'from-image' : 'none';
  const options = { imageOrientation, colorSpaceConversion: 'none' };
  const stored = await createImageBitmap(blob, options).catch(() => {
    throw new Error('no image that this browser reads');
  });
  const picture = turned(stored, orientation);
  const { height, width } = picture;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d', { willReadFrequently: true });
  if (context === null) throw new Error(`${width} x ${height} pixels are too many for this browser`);
  context.fillStyle = '#fff';
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0);
  return { picture, height, width, rgba: context.getImageData(0, 0, width, height).data };
}

/** Return a picture turned upright by EXIF's orientation. */
function turned(picture, orientation) {
  if (orientation === 1) return picture;
  const { height, width } = picture;
  const matrices = {
    2: [-1, 0, 0, 1, width, 0],
    3: [-1, 0, 0, -1, width, height],
    4: [1, 0, 0, -1, 0, height],
    5: [0, 1, 1, 0, 0, 0],
    6: [0, 1, -1, 0, height, 0],
    7: [0, -1, -1, 0, height, width],
    8: [0, -1, 1, 0, 0, width],
  };
  const size = orientation > 4 ? [height, width] : [width, height];
  const canvas = new OffscreenCanvas(...size);
  const context = canvas.getContext('2d');
  context.imageSmoothingEnabled = false;
  context.setTransform(...matrices[orientation]);
  context.drawImage(picture, 0, 0);
  return canvas;
}

/**
 * Detect the objects of an image file.
 *
 * @returns {{height, width, detections: {label, score, box}[], milliseconds}} without a threshold,
 *   best first; boxes [left, top, right, bottom] in pixels of the upright image.
 */
async function detect(blob) {
  const began = performance.now();
  const { picture, height, width, rgba } = await decode(blob);
  const [newHeight, newWidth] = resizedSize(height, width, card.short_side, card.long_side);
  const planes = resize(rgba, height, width, newHeight, newWidth);
  const resized = performance.now();
  const answer = await compute(planes, newHeight, newWidth);
  const [found, labels, boxes] = session.outputs.map((name) => answer[name].data);
  const detections = Array.from(found, (score, i) => ({
    label: Number(labels[i]),
    score,
    box: [0, 1, 2, 3].map((side) => Math.fround(boxes[4 * i + side] * (side % 2 ? height : width))),
  }));
  const ended = performance.now();
  return {
    picture, height, width, detections,
    milliseconds: { all: ended - began, network: ended - resized },
  };
}

async function take(blob, name) {
  say(`${name}: detecting ...`);
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  try {
    shown = { name, ...(await detect(blob)) };
    $('result').hidden = false;
    show();
  } catch (error) {
    say(`${name}: ${error.message}`, true);
  }
}

function wanted() {
  const above = shown.detections.filter((one) => one.score >= Math.fround(scores[one.label]));
  return $('nms').checked ? suppress(above, Number($('iou').value)) : above;
}

function show() {
  if (shown === null) return;
  const found = wanted();
  draw(found);
  const rows = found.map((one) => {
    const { name, colour } = card.classes[one.label];
    const row = document.createElement('tr');
    const swatch = document.createElement('span');
    swatch.className = 'swatch';
    swatch.style.background = colour;
    const cells = [name, one.score.toFixed(2), one.box.map(Math.round).join(', ')];
    row.append(...cells.map((text) => Object.assign(document.createElement('td'), { textContent: text })));
    row.firstChild.prepend(swatch);
    return row;
  });
  $('rows').replaceChildren(...rows);
  const { all, network } = shown.milliseconds;
  const objects = `${found.length} object${found.length === 1 ? '' : 's'}`;
  say(`${shown.name}: ${objects}, ${Math.round(all)} ms (network ${Math.round(network)} ms)`);
}

function draw(found) {
  const { picture, height, width } = shown;
  const canvas = $('canvas');
  // Letters and lines of one size on the screen, whatever the size of the image.
  const unit = Math.min(2, devicePixelRatio || 1);
  const wide = Math.min($('result').clientWidth, Math.max(SMALLEST_SHOWN, width));
  const scale = (wide * unit) / width;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${wide}px`;
  const context = canvas.getContext('2d');
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const size = 13 * unit;
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = 'top';
  const byArea = [...found].sort((a, b) => area(b.box) - area(a.box));
  for (const one of byArea) {
    const [left, top, right, bottom] = one.box.map((side) => side * scale);
    for (const [colour, line] of [['#222222', 4 * unit], [card.classes[one.label].colour, 2 * unit]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(left, top, right - left, bottom - top);
    }
  }
  for (const one of byArea) {
    const { name, colour, ink } = card.classes[one.label];
    const text = `${name} ${one.score.toFixed(2)}`;
    const long = context.measureText(text).width + 6 * unit;
    const high = size + 5 * unit;
    const x = Math.max(0, Math.min(one.box[0] * scale - unit, canvas.width - long));
    const above = one.box[1] * scale - high;
    const y = above >= 0 ? above : Math.min(one.box[3] * scale, canvas.height - high);
    context.fillStyle = colour;
    context.fillRect(x, y, long, high);
    context.fillStyle = ink;
    context.fillText(text, x + 3 * unit, y + 3 * unit);
  }
  canvas.setAttribute('aria-label', `${shown.name} with ${found.length} detected objects`);
}

const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);

// Controls.

function showThreshold() {
  const chosen = $('class').value === '' ? scores : [scores[Number($('class').value)]];
  const low = Math.min(...chosen);
  const high = Math.max(...chosen);
  $('score').value = (low + high) / 2;
  $('score-text').textContent =
    low === high ? low.toFixed(2) : `${low.toFixed(2)} to ${high.toFixed(2)}`;
}

function setThreshold(value) {
  const only = $('class').value;
  scores.forEach((_, label) => {
    if (only === '' || Number(only) === label) scores[label] = value;
  });
  $('score-text').textContent = value.toFixed(2);
  show();
}

function listen() {
  const file = $('file');
  file.addEventListener('change', () => {
    if (file.files.length > 0) take(file.files[0], file.files[0].name);
    file.value = ''; // so that the same file may be chosen again
  });
  if ($('example')) $('example').addEventListener('click', async () => {
    const data = Uint8Array.from(atob($('picture').textContent.trim()), (one) => one.charCodeAt(0));
    take(new Blob([data]), card.example);
  });
  const drop = $('drop');
  for (const kind of ['dragenter', 'dragover']) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add('over');
    });
  }
  document.addEventListener('dragleave', (event) => {
    if (event.relatedTarget === null) drop.classList.remove('over');
  });
  const takeFirst = (event, files) => {
    drop.classList.remove('over');
    if (!files || files.length === 0) return;
    event.preventDefault();
    take(files[0], files[0].name);
  };
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    takeFirst(event, event.dataTransfer.files);
  });
  document.addEventListener('paste', (event) => takeFirst(event, event.clipboardData.files));
  $('score').addEventListener('input', () => setThreshold(Number($('score').value)));
  $('class').addEventListener('change', showThreshold);
  $('auto').addEventListener('click', () => {
    card.classes.forEach((one, label) => (scores[label] = one.score));
    showThreshold();
    show();
  });
  $('nms').addEventListener('change', () => {
    $('iou').disabled = !$('nms').checked;
    show();
  });
  $('iou').addEventListener('input', () => {
    $('iou-text').textContent = Number($('iou').value).toFixed(2);
    show();
  });
  addEventListener('resize', show);
}

showThreshold();
try {
  await start();
  for (const control of document.querySelectorAll('.waits')) control.disabled = false;
  listen();
  say('Ready.');
  globalThis.runkey = { detect, take };
} catch (error) {
  say(`The model does not start in this browser: ${error.message}`, true);
}
