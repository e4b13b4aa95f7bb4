// Before the page is drawn, so that it never flashes in the other ground.
"use strict";
(() => {
  let kept = null;
  try { kept = localStorage.getItem("wholegrad-theme"); } catch { /* storage may be forbidden */ }
  if (kept === "dark" || kept === "light") document.documentElement.dataset.theme = kept;
})();
