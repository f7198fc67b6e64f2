"use strict";
// The keys of the page, and its clock. Without this script, the same forms work with the pointer.

const element = id => document.getElementById(id);
const field = element("hypothesis");

function choose(answer) {
  element(answer).checked = true;
  if (answer === "yes") {
    field.focus();
    field.select();
  }
}

const actions = {
  y: () => field && choose("yes"),
  n: () => field && choose("no"),
  u: () => { const button = element("undo").querySelector("button"); if (!button.disabled) button.click(); },
  p: () => element("pause") && element("pause").requestSubmit(),
  Enter: () => element("answer") && element("answer").requestSubmit(),
};

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target === field) {
    if (event.key === "Escape") field.blur();
    return;  // Enter sends the form, and letters are text
  }
  if (event.target.closest("button") && event.key === "Enter") return;
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});

// A second Enter while the answer is on its way must not send the form twice.
for (const form of document.forms) {
  form.addEventListener("submit", () => {
    for (const button of form.querySelectorAll("button")) button.disabled = true;
  });
}

const clock = document.querySelector(".clock");
if (clock) {
  const start = performance.now() - 1000 * Number(clock.dataset.seconds);
  setInterval(() => {
    const seconds = Math.floor((performance.now() - start) / 1000);
    clock.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    clock.classList.toggle("late", seconds >= 120);
  }, 500);
}
