// A field above long tables that hides the rows without the words typed into it.
document.addEventListener("DOMContentLoaded", () => {
  const rows = [...document.querySelectorAll("article table tbody tr")];
  if (rows.length < 60) return;
  const field = Object.assign(document.createElement("input"), {
    type: "search", placeholder: "Filter the rows of this page, e.g. train.optim lr", ariaLabel: "Filter rows",
  });
  field.style.cssText = "width: 100%; box-sizing: border-box; padding: .5em; margin: 0 0 1em; font: inherit;"
    + " position: sticky; top: .5em; z-index: 1; color: inherit; background: var(--color-background-primary);"
    + " border: 1px solid var(--color-foreground-border); border-radius: .3em";
  const words = rows.map((row) => row.textContent.toLowerCase());
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row, index) => { row.hidden = !wanted.every((word) => words[index].includes(word)); });
    document.querySelectorAll("article section section").forEach((section) => {
      const own = [...section.querySelectorAll("tbody tr")];
      section.hidden = own.length > 0 && own.every((row) => row.hidden);
    });
  });
  document.querySelector("article h1").after(field);
});
