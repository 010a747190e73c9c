"use strict";
(() => {
  const at = (id) => document.getElementById(id);
  const pairs = JSON.parse(at("pairs").textContent); // [{pair, original, a, b}]
  const page = document.querySelector("main").dataset.page;
  const ORDER = ["a", "original", "b"];
  let state = { judge: "", answers: [] }; // answers in the order of the pairs: {pair, choice, time_s}
  let now = "original";
  let since = performance.now();

  // Some browsers keep nothing for a page from a file; then answers live as long as the page.
  function load() {
    try {
      const kept = JSON.parse(localStorage.getItem(`prefer-${page}`));
      if (kept && Array.isArray(kept.answers) && kept.answers.every((one, i) => one.pair === pairs[i].pair)) state = kept;
    } catch {
      // nothing kept
    }
  }

  function keep() {
    try {
      localStorage.setItem(`prefer-${page}`, JSON.stringify(state));
    } catch {
      // see load
    }
  }

  function show() {
    const n = state.answers.length;
    const done = n === pairs.length;
    at("app").hidden = done;
    at("end").hidden = !done;
    at("progress").value = n;
    at("judge").value = state.judge;
    if (done) return;
    at("where").textContent = `Pair ${n + 1} of ${pairs.length}`;
    for (const what of ORDER) at(`picture-${what}`).src = pairs[n][what];
    at("back").disabled = n === 0;
    look("original");
    since = performance.now();
  }

  function look(what) {
    now = what;
    const flip = at("layout").value === "flip";
    at("stage").classList.toggle("flip", flip);
    at("tabs").hidden = !flip;
    for (const figure of at("stage").children) figure.classList.toggle("now", figure.dataset.what === what);
    for (const tab of at("tabs").children) tab.setAttribute("aria-pressed", tab.dataset.now === what);
  }

  function answer(choice) {
    const n = state.answers.length;
    if (n === pairs.length) return;
    const time_s = Math.round(performance.now() - since) / 1000;
    state.answers.push({ pair: pairs[n].pair, choice, time_s });
    keep();
    show();
  }

  function back() {
    state.answers.pop();
    keep();
    show();
  }

  function save() {
    const text = JSON.stringify({ page, judge: state.judge, answers: state.answers }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "answers.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  const actions = {
    1: () => answer("a"),
    2: () => answer("b"),
    0: () => answer("tie"),
    Backspace: back,
    " ": () => look(ORDER[(ORDER.indexOf(now) + 1) % ORDER.length]),
  };
  let before = null; // what was seen before o was held
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select, button") && !"120".includes(event.key);
    if (event.target.matches("input") || typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.key === "o" && before === null) {
      before = now;
      look("original");
    } else if (event.key in actions) {
      event.preventDefault();
      actions[event.key]();
    }
  });
  document.addEventListener("keyup", (event) => {
    if (event.key !== "o" || before === null) return;
    look(before);
    before = null;
  });
  // A button that was clicked with the mouse gives the keys back: else space would press it again, for the next pair.
  const onPress = (button, action) => {
    button.addEventListener("click", (event) => {
      if (event.detail > 0) button.blur();
      action();
    });
  };
  for (const button of document.querySelectorAll("[data-choice]")) onPress(button, () => answer(button.dataset.choice));
  for (const tab of at("tabs").children) onPress(tab, () => look(tab.dataset.now));
  at("stage").addEventListener("click", () => look(ORDER[(ORDER.indexOf(now) + 1) % ORDER.length]));
  at("layout").addEventListener("change", () => look(now));
  onPress(at("back"), back);
  at("save").addEventListener("click", save);
  at("again").addEventListener("click", () => {
    if (!window.confirm("Forget all answers on this page?")) return;
    state = { judge: state.judge, answers: [] };
    keep();
    show();
  });
  at("judge").addEventListener("input", (event) => {
    state.judge = event.target.value;
    keep();
  });

  if (window.matchMedia("(max-width: 700px)").matches) at("layout").value = "flip"; // three would be stamps
  load();
  show();
})();
