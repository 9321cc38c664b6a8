// What scrolls sideways can be reached by keyboard: formulas and quoted tables too, of which the theme knows nothing.
(() => {
  "use strict";
  const reach = () => {
    for (const one of document.querySelectorAll("mjx-container[display], .output.text_html")) {
      if (one.scrollWidth > one.clientWidth) one.tabIndex = 0;
    }
  };
  new ResizeObserver(reach).observe(document.body); // at first, once formulas are set, and when the window changes
})();
