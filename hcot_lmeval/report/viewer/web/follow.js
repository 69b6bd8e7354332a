// A page that is served: asks whether there are more traces, and offers to show them. The trace on the screen stays.

const EVERY = 2000;
const named = (row) => JSON.stringify([SOURCES[row.source].name, row.task, row.doc, row.repeat]);

async function follow(offer) {
  try {
    const told = await (await fetch("state")).json();
    const more = told.state !== INDEX.state;
    offer.hidden = !more && !told.error;
    offer.textContent = told.error ?? "More traces";
  } catch {
    offer.hidden = false;
    offer.textContent = "The server has stopped";
  }
  setTimeout(() => follow(offer), EVERY);
}

{
  const offer = make("button", { type: "button", id: "more", class: "quiet", text: "", on: { click: () => location.reload() } });
  offer.hidden = true;
  byId("keys").before(offer);
  const shown = sessionStorage.getItem("shown");
  const row = shown && ROWS.find((other) => named(other) === shown);
  if (row) choose(row.place);
  addEventListener("beforeunload", () => ROWS[current] && sessionStorage.setItem("shown", named(ROWS[current])));
  follow(offer);
}
