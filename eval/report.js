"use strict";
(() => {
  const data = document.getElementById("shown");
  if (!data) return;
  // [{name, why, variants: [{label, caption, id}]}]; the pictures themselves are the <img> of the gallery.
  const images = JSON.parse(data.textContent);
  const at = (id) => document.getElementById(id);
  const canvas = at("canvas");
  const context = canvas.getContext("2d");
  const MAX_SCALE = 32;
  // x, y: the point of the image at the centre of the canvas; scale: pixels of the screen for one of the image.
  const state = { image: 0, left: 0, right: 1, mode: 0, split: 0.5, scale: 1, x: 0, y: 0, fitted: true };
  let difference = { key: "", picture: null };

  const variants = () => images[state.image].variants;
  const picture = (index) => at(variants()[index].id);
  const ratio = () => window.devicePixelRatio || 1;
  const size = () => ({ width: picture(0).naturalWidth, height: picture(0).naturalHeight });
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const fitting = () => Math.min(canvas.width / size().width, canvas.height / size().height);
  const origin = () => ({
    x: Math.round(canvas.width / 2 - state.x * state.scale),
    y: Math.round(canvas.height / 2 - state.y * state.scale),
  });

  function resize() {
    const width = canvas.clientWidth;
    const { width: w, height: h } = size();
    const height = Math.round(clamp((width * h) / w, 200, Math.max(240, window.innerHeight * 0.72)));
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio());
    canvas.height = Math.round(height * ratio());
    if (state.fitted) fit();
    else draw();
  }

  function fit() {
    state.fitted = true;
    state.scale = fitting();
    state.x = size().width / 2;
    state.y = size().height / 2;
    draw();
  }

  // Zoom so that the point of the image under (px, py) of the canvas stays there; default: its centre.
  function zoom(scale, px = canvas.width / 2, py = canvas.height / 2) {
    scale = clamp(scale, Math.min(fitting(), 1), MAX_SCALE);
    const x = state.x + (px - canvas.width / 2) / state.scale;
    const y = state.y + (py - canvas.height / 2) / state.scale;
    state.x = x - (px - canvas.width / 2) / scale;
    state.y = y - (py - canvas.height / 2) / scale;
    state.scale = scale;
    state.fitted = Math.abs(scale / fitting() - 1) < 1e-6;
    pan(0, 0);
  }

  // By screen pixels; the picture never leaves its frame, and stays in the middle where it is smaller.
  function pan(dx, dy) {
    const along = (value, moved, image, frame) => {
      const half = frame / 2 / state.scale;
      return image <= 2 * half ? image / 2 : clamp(value - moved / state.scale, half, image - half);
    };
    state.x = along(state.x, dx, size().width, canvas.width);
    state.y = along(state.y, dy, size().height, canvas.height);
    draw();
  }

  // Powers of two and of one half, and the fitting scale between them.
  function step(direction) {
    const stops = [fitting()];
    for (let scale = 1 / 16; scale <= MAX_SCALE; scale *= 2) stops.push(scale);
    stops.sort((a, b) => a - b);
    const beyond = stops.filter((s) => (direction > 0 ? s > state.scale * 1.01 : s < state.scale * 0.99));
    if (beyond.length) zoom(direction > 0 ? beyond[0] : beyond[beyond.length - 1]);
  }

  // |left - right| of every channel, times the factor, as a canvas of the image's size.
  function differences() {
    const key = [state.image, state.left, state.right, state.mode].join();
    if (difference.key !== key) {
      const { width, height } = size();
      const pixels = [state.left, state.right].map((index) => {
        const one = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
        one.drawImage(picture(index), 0, 0);
        return one.getImageData(0, 0, width, height);
      });
      const [a, b] = pixels.map((item) => item.data);
      for (let i = 0; i < a.length; i++) a[i] = i % 4 === 3 ? 255 : Math.abs(a[i] - b[i]) * state.mode;
      const result = new OffscreenCanvas(width, height);
      result.getContext("2d").putImageData(pixels[0], 0, 0);
      difference = { key, picture: result };
    }
    return difference.picture;
  }

  // Where the line stands, in pixels of the canvas: the slider runs over the part of the image that is seen.
  function line() {
    const low = Math.max(0, origin().x);
    const high = Math.min(canvas.width, origin().x + size().width * state.scale);
    return { low, high, x: Math.round(low + (high - low) * state.split) };
  }

  function paint(source, from, to) {
    const { width, height } = size();
    const { x, y } = origin();
    context.save();
    context.beginPath();
    context.rect(from, 0, to - from, canvas.height);
    context.clip();
    context.imageSmoothingEnabled = state.scale < 1 || (state.scale < 3 && !Number.isInteger(state.scale));
    context.imageSmoothingQuality = "high";
    context.drawImage(source, x, y, width * state.scale, height * state.scale);
    context.restore();
  }

  function draw() {
    context.fillStyle = "#808080";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const { x } = line();
    if (state.mode) {
      paint(differences(), 0, canvas.width);
    } else {
      paint(picture(state.left), 0, x);
      paint(picture(state.right), x, canvas.width);
      handle(x);
    }
    at("zoom").value = `${Math.round(state.scale * 100)} %`;
    at("split").value = Math.round(state.split * 1000);
    at("split").disabled = state.mode > 0;
    canvas.style.touchAction = state.scale <= fitting() * 1.01 ? "pan-y" : "none"; // so that a thumb can pass it
  }

  function handle(x) {
    const unit = ratio();
    context.fillStyle = "#fff";
    context.fillRect(x - unit, 0, 2 * unit, canvas.height);
    context.beginPath();
    context.arc(x, canvas.height - 28 * unit, 14 * unit, 0, 2 * Math.PI);
    context.fill();
    context.strokeStyle = "#333";
    context.lineWidth = 2 * unit;
    context.stroke();
    context.fillStyle = "#333";
    context.font = `${15 * unit}px sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText("↔", x, canvas.height - 27 * unit);
  }

  function options(select, texts) {
    select.replaceChildren(...texts.map((text, index) => new Option(text, index)));
  }

  async function show() {
    const image = images[state.image];
    const n = image.variants.length;
    state.left = Math.min(state.left, n - 1);
    state.right = Math.min(state.right, n - 1);
    for (const side of ["left", "right"]) {
      options(at(side), image.variants.map((variant) => variant.label));
      at(side).value = state[side];
      const { label, caption } = image.variants[state[side]];
      at(`${side}-label`).textContent = `${side}: ${label}`;
      at(`${side}-caption`).textContent = caption;
    }
    at("image").value = state.image;
    at("mode").value = state.mode;
    at("why").textContent = image.why;
    const [left, right] = [image.variants[state.left].label, image.variants[state.right].label];
    canvas.setAttribute("aria-label", `${image.name}: ${left} and ${right}`);
    await Promise.all([picture(0).decode(), picture(state.left).decode(), picture(state.right).decode()]);
    resize();
    canvas.dataset.ready = [state.image, state.left, state.right, state.mode].join();
  }

  function select(change) {
    const before = state.image;
    Object.assign(state, change);
    state.image = (state.image + images.length) % images.length;
    if (state.image !== before) state.fitted = true;
    return show();
  }

  function pointers() {
    const down = new Map();
    let spread = 0;
    let sliding = false;
    const where = (event) => {
      const box = canvas.getBoundingClientRect();
      return { x: (event.clientX - box.left) * ratio(), y: (event.clientY - box.top) * ratio() };
    };
    const pair = () => {
      const [a, b] = [...down.values()];
      return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, spread: Math.hypot(a.x - b.x, a.y - b.y) };
    };
    const slide = (x) => {
      const { low, high } = line();
      state.split = clamp((x - low) / Math.max(1, high - low), 0, 1);
      draw();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      down.set(event.pointerId, where(event));
      const whole = state.scale <= fitting() * 1.01;
      sliding = down.size === 1 && !state.mode && (whole || Math.abs(where(event).x - line().x) < 28 * ratio());
      if (sliding) slide(where(event).x);
      if (down.size === 2) spread = pair().spread;
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!down.has(event.pointerId)) return;
      const before = down.size === 2 ? pair() : down.get(event.pointerId);
      down.set(event.pointerId, where(event));
      if (down.size === 2) {
        const now = pair();
        zoom((state.scale * now.spread) / (spread || now.spread), now.x, now.y);
        pan(now.x - before.x, now.y - before.y);
        spread = now.spread;
      } else if (sliding) slide(where(event).x);
      else pan(where(event).x - before.x, where(event).y - before.y);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => {
        down.delete(event.pointerId);
        sliding = false;
      });
    }
    canvas.addEventListener(
      "wheel",
      (event) => {
        const scale = state.scale * 2 ** clamp(-event.deltaY / 200, -1, 1);
        if (scale < Math.min(fitting(), 1) * 0.99 && state.scale <= Math.min(fitting(), 1) * 1.001) return; // scroll on
        event.preventDefault();
        zoom(scale, where(event).x, where(event).y);
      },
      { passive: false },
    );
  }

  function keys() {
    const far = () => 80 * ratio();
    const slide = (by) => {
      state.split = clamp(state.split + by, 0, 1);
      draw();
    };
    const actions = {
      ArrowLeft: () => pan(far(), 0),
      ArrowRight: () => pan(-far(), 0),
      ArrowUp: () => pan(0, far()),
      ArrowDown: () => pan(0, -far()),
      "+": () => step(1),
      "=": () => step(1),
      "-": () => step(-1),
      0: fit,
      1: () => zoom(1),
      "[": () => slide(-0.05),
      "]": () => slide(0.05),
      d: () => select({ mode: state.mode ? 0 : 4 }),
      s: () => select({ left: state.right, right: state.left }),
      n: () => select({ image: state.image + 1 }),
      p: () => select({ image: state.image - 1 }),
    };
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
      event.preventDefault();
      actions[event.key]();
    });
  }

  function controls() {
    for (const name of ["image", "left", "right", "mode"]) {
      at(name).addEventListener("change", (event) => select({ [name]: Number(event.target.value) }));
    }
    at("previous").addEventListener("click", () => select({ image: state.image - 1 }));
    at("next").addEventListener("click", () => select({ image: state.image + 1 }));
    at("swap").addEventListener("click", () => select({ left: state.right, right: state.left }));
    at("split").addEventListener("input", (event) => {
      state.split = Number(event.target.value) / 1000;
      draw();
    });
    at("in").addEventListener("click", () => step(1));
    at("out").addEventListener("click", () => step(-1));
    at("one").addEventListener("click", () => zoom(1));
    at("fit").addEventListener("click", fit);
    for (const link of document.querySelectorAll("a[data-show]")) {
      link.addEventListener("click", () => select({ image: Number(link.dataset.show) }));
    }
    window.addEventListener("resize", resize);
  }

  document.documentElement.classList.add("js");
  at("viewer").hidden = false;
  options(at("image"), images.map((image) => image.name));
  pointers();
  keys();
  controls();
  show();
})();
