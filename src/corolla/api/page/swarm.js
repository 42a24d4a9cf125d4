import { events } from "/page/talk.js";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function bar(parts, blocks) {
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("viewBox", `0 0 ${blocks} 1`);
  made.setAttribute("preserveAspectRatio", "none");
  made.setAttribute("aria-hidden", "true");
  for (const [start, end, kind] of [[0, blocks, "rest"], ...parts]) {
    const part = document.createElementNS(SVG, "rect");
    for (const [name, value] of Object.entries({ x: start, y: 0, width: end - start, height: 1 })) {
      part.setAttribute(name, value);
    }
    part.setAttribute("class", kind);
    made.append(part);
  }
  return made;
}

function row(cells, kinds) {
  const made = document.createElement("tr");
  cells.forEach((cell, index) => {
    const place = document.createElement("td");
    place.append(cell);
    if (kinds[index]) place.className = kinds[index];
    made.append(place);
  });
  return made;
}

function server(one, blocks) {
  const state = one.condemned ? "found lying" : one.state === "draining" ? "leaving" : one.used ? "in use" : "there";
  const arithmetic = one.quantization === "none" ? one.dtype : `${one.dtype}+${one.quantization}`;
  return row(
    [
      `…${one.peer_id.slice(-8)}`, `${one.start}:${one.end}`, bar([[one.start, one.end, ""]], blocks), arithmetic,
      Math.round(one.throughput).toLocaleString(), one.free_cache_tokens.toLocaleString(), one.version, state,
    ],
    ["", "", "bar", "", "number", "number", "", one.condemned ? "bad" : ""],
  );
}

function draw(found) {
  const gaps = found.missing.map(([start, end]) => `${start}:${end}`).join(", ");
  $("state").textContent = gaps
    ? `${found.model}: nobody serves blocks ${gaps}.`
    : `${found.model}: ${found.blocks} blocks, ${found.count} server${found.count === 1 ? "" : "s"}, complete.`;
  $("state").className = gaps ? "bad" : "good";
  const rows = found.servers.map((one) => server(one, found.blocks));
  if (gaps) {
    const missing = bar(found.missing.map(([start, end]) => [start, end, "gap"]), found.blocks);
    rows.push(row(["missing", gaps, missing, "", "", "", "", ""], ["bad", "bad", "bar"]));
  }
  $("servers").replaceChildren(...rows);
  if (!found.changes.length) return;
  $("changes").replaceChildren(
    ...found.changes.map((one) => {
      const item = document.createElement("li");
      item.textContent = `${new Date(one.at * 1000).toLocaleTimeString()}: …${one.peer_id.slice(-8)} ${one.what}`;
      return item;
    }),
  );
}

for (;;) {
  try {
    for await (const found of events("/api/swarm/events")) draw(found);
  } catch (error) {
    $("state").textContent = error.message;
    $("state").className = "bad";
  }
  await new Promise((later) => setTimeout(later, 3000));
}
