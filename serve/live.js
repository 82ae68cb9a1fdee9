// Asks the server now and then whether what it serves has changed, and if so has the page drawn anew.
(() => {
  const INTERVAL_MS = 1000;
  const drawn = () => document.querySelector("#state [data-revision]")?.dataset.revision;
  const PATIENCE_MS = 2500;
  let pressed = "";
  let when = 0;
  const look = async () => {
    if (document.hidden || drawn() === undefined) return;
    try {
      const answer = await fetch("revision", { cache: "no-store" });
      if (!answer.ok) return;
      const { revision } = await answer.json();
      // Drawing takes a moment, and may itself be refused: then it is asked for again.
      const now = Date.now();
      if (String(revision) !== drawn() && (String(revision) !== pressed || now - when > PATIENCE_MS)) {
        pressed = String(revision);
        when = now;
        // Pages were opened at different moments, so they do not all ask at once.
        document.querySelector("#refresh")?.click();
      }
    } catch {
      // The server is away: the page's own events say so.
    }
  };
  setInterval(look, INTERVAL_MS);
  document.addEventListener("visibilitychange", look);
})();
