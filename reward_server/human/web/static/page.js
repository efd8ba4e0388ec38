// Keys, focus and announcements. The page works without this file, as plain forms.
"use strict";

(() => {
  const UNREACHABLE = "The server cannot be reached. Your last step may not be stored: try it again.";
  const live = document.getElementById("live");
  const trouble = document.getElementById("trouble");
  const keys = document.getElementById("keys");
  const keysOn = document.getElementById("keys-on");
  let shown = document.getElementById("main");

  const tell = (problem) => {
    trouble.textContent = problem;
    trouble.hidden = !problem;
  };

  // An error page of ours says what is wrong, one of a proxy does not.
  const said = (text) =>
    new DOMParser().parseFromString(text, "text/html").getElementById("main")?.dataset.say ?? UNREACHABLE;

  if (keys) {
    // Single keys get in the way of speech input, so that they can be turned off (WCAG 2.1.4).
    keysOn.checked = localStorage.getItem("keys") !== "off";
    keysOn.addEventListener("change", () => localStorage.setItem("keys", keysOn.checked ? "on" : "off"));
    for (const opener of document.querySelectorAll('[data-open="keys"]')) {
      opener.hidden = false;
      opener.addEventListener("click", () => keys.showModal());
    }
    document.addEventListener("keydown", (event) => {
      if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
      if (event.target.closest("input, textarea, select")) return;
      if (event.key === "?") {
        keys.showModal();
      } else if (keysOn.checked) {
        document.querySelector(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`)?.click();
      }
    });
  }

  document.addEventListener("htmx:before:request", (event) => {
    const { ctx } = event.detail;
    if (ctx.request.method === "POST") {
      ctx.request.submitter?.classList.add("pressed");
    } else if (document.hidden) {
      // A tab that nobody looks at would take a completion from those who rate.
      event.preventDefault();
    }
  });

  document.addEventListener("htmx:after:request", (event) => {
    // What may go well a moment later leaves the completion where it is, to be rated again.
    const { response, text } = event.detail.ctx;
    const failed = response.status === 429 || response.status >= 500;
    tell(failed ? said(text) : "");
    if (failed) event.preventDefault();
  });

  document.addEventListener("htmx:error", () => tell(UNREACHABLE));

  document.addEventListener("htmx:finally:request", (event) => {
    event.detail.ctx.request.submitter?.classList.remove("pressed");
  });

  document.addEventListener("htmx:after:swap", () => {
    const main = document.getElementById("main");
    if (main === shown) return;
    shown = main;
    live.replaceChildren(main.dataset.say ?? "");
    // What had the focus is gone; the keyboard and a screen reader go on where the new text begins.
    if (document.activeElement === document.body) main.querySelector("[data-focus]")?.focus({ preventScroll: true });
    window.scrollTo(0, 0);
  });
})();
