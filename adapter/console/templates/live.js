"use strict";
// Fetches the page again every few seconds and puts its changing part in place. Without this, the page reloads itself.
let seen = new Date();
async function look() {
  const live = document.getElementById("live");
  if (!live || !live.dataset.every) return;
  if (!document.hidden) {
    const silent = document.getElementById("silent");
    try {
      const answer = await fetch(location.href, { headers: { "X-Part": "1" }, cache: "no-store" });
      if (answer.status === 401) return location.reload();
      if (!answer.ok) throw new Error(answer.status);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of ["live", "numbers", "nav", "foot"]) {
        const there = document.getElementById(part), now = page.getElementById(part);
        if (there && now && there.outerHTML !== now.outerHTML) there.replaceWith(now);
      }
      seen = new Date();
      silent.hidden = true;
    } catch {
      silent.querySelector("span").textContent = seen.toLocaleTimeString();
      silent.hidden = false;
    }
  }
  setTimeout(look, 1000 * live.dataset.every);
}
setTimeout(look, 1000 * document.getElementById("live").dataset.every || 1000);
