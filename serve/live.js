// Asks the server now and then whether what it serves has changed, and if so has the page drawn anew.
(() => {
  const INTERVAL_MS = 1000;
  const drawn = () => document.querySelector("#state [data-revision]")?.dataset.revision;
  let pressed = "";
  const look = async () => {
    if (document.hidden || drawn() === undefined) return;
    try {
      const answer = await fetch("revision", { cache: "no-store" });
      if (!answer.ok) return;
      const { revision } = await answer.json();
      // Pressed once for each revision: drawing takes a moment, and may itself be refused.
      if (String(revision) !== drawn() && String(revision) !== pressed) {
        pressed = String(revision);
        document.querySelector("#refresh")?.click();
      }
    } catch {
      // The server is away: the page's own events say so.
    }
  };
  setInterval(look, INTERVAL_MS);
  document.addEventListener("visibilitychange", look);
})();
