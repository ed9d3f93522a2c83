// Loaded only on pages with a moving figure, after require.js and before the widget manager.

// The manager's fonts lie beside it, not beside the page.
requirejs.config({ baseUrl: new URL("html-manager/", document.currentScript.src).href });

// Widgets ask for MathJax 2's queue; this site serves MathJax 3.
document.addEventListener("DOMContentLoaded", () => {
  if (!window.MathJax) return;
  MathJax.Hub = {
    Queue: ([, , element]) => MathJax.startup.promise.then(() => MathJax.typesetPromise([element])),
  };
});

// A slider's handle takes its name from the slider's label (ipywidgets leaves it nameless).
new MutationObserver(() => {
  for (const handle of document.querySelectorAll(".noUi-handle:not([aria-label])")) {
    const label = handle.closest(".jupyter-widgets")?.querySelector(".widget-label");
    if (label?.textContent) handle.setAttribute("aria-label", label.textContent);
  }
}).observe(document, { childList: true, subtree: true });
