"use strict";
// Ctrl and Enter send the form from a text field, where Enter alone begins a new line.
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) document.getElementById("editor").requestSubmit();
});
