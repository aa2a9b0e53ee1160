// What Dash cannot say in Python; everything else is in page.py.

// Buttons in tables say which events they are for.
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-behind]");
  if (button) window.dash_clientside.set_props("behind", { data: JSON.parse(button.dataset.behind) });
});

window.dash_clientside = window.dash_clientside || {};
window.dash_clientside.page = {
  // Whoever asked for the events behind something is brought to them, with the keyboard too.
  toEvents(behind) {
    const title = document.getElementById("events-title");
    if (behind.label) {
      title.scrollIntoView({ block: "start" });
      title.focus({ preventScroll: true });
    }
    return behind.label || "";
  },
};
