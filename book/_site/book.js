// Loaded on every page, deferred: mends what the theme leaves unclear to a screen reader.

function mend() {
  // The visible words must be part of the name: drop labels that replace them.
  for (const button of document.querySelectorAll("summary[aria-label], .search-button-field")) {
    button.removeAttribute("aria-label");
  }
  // The switch shows one of three icons; their titles are no text of the button.
  for (const icon of document.querySelectorAll(".theme-switch-button [title]")) {
    icon.removeAttribute("title");
  }
  for (const icon of document.querySelectorAll(".theme-switch-button svg")) {
    icon.querySelector("title")?.remove();
    icon.removeAttribute("aria-labelledby");
    icon.setAttribute("aria-hidden", "true");
  }
  // Sphinx calls the bibliography a list without list items.
  for (const list of document.querySelectorAll(".citation-list[role=list]")) {
    list.removeAttribute("role");
  }
}

// A figure with many panels is small on a phone: a tap opens it alone, to be zoomed.
function openable() {
  for (const image of document.querySelectorAll(".cell_output img[src$='.png']")) {
    if (image.closest("a")) continue;
    const link = document.createElement("a");
    link.href = image.src;
    image.replaceWith(link);
    link.append(image);
  }
}

// What scrolls sideways can be reached by keyboard; the theme looks at code only once, too early.
const SCROLLS = "mjx-container[display], .cell_output, .bd-article pre, .bd-article table";
function reachable() {
  for (const box of document.querySelectorAll(SCROLLS)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
}

mend();
openable();
window.addEventListener("load", () => {
  mend();
  (window.MathJax?.startup?.promise ?? Promise.resolve()).then(reachable);
});
document.addEventListener("toggle", reachable, true);
document.fonts.ready.then(reachable);
