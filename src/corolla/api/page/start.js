// The form that starts a run: first what it would be trained on, then the button.
import { send } from "/page/talk.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["prompt_tokens", "rank", "steps", "batch_size", "max_length", "learning_rate"];

const MOST_BYTES = 8 * 2 ** 20; // that the server takes

// The file as it is: file.text() would put signs of its own in the place of what is no UTF-8.
async function read(file) {
  if (file.size > MOST_BYTES) throw new Error(`${file.name} has more than 8 MiB: train on it with corolla tune.`);
  const bytes = await file.arrayBuffer();
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new Error(`${file.name} is not text in UTF-8: save it as that first.`);
  }
}

async function asked() {
  const file = $("file").files[0];
  const found = { name: $("name").value, file: file.name, content: await read(file), mode: $("mode").value };
  for (const name of NUMBERS) if ($(name).value !== "" && !$(name).disabled) found[name] = Number($(name).value);
  return found;
}

function told(words, bad = false) {
  $("about").textContent = words;
  $("about").className = bad ? "bad" : "";
}

function example(pieces, index) {
  const made = document.createElement("figure");
  const title = document.createElement("figcaption");
  title.textContent = `Example ${index + 1}: what is marked is learnt`;
  const text = document.createElement("pre");
  for (const piece of pieces) {
    const part = document.createElement(piece.learnt ? "mark" : "span");
    part.textContent = piece.text;
    text.append(part);
  }
  text.tabIndex = 0;
  made.append(title, text);
  return made;
}

let shown = null; // what was looked at, and can be started

function changed() {
  shown = null;
  $("start").disabled = true;
}

// An adapter has a rank, all else so many tokens in front.
function fitting() {
  const adapter = $("mode").value === "lora";
  for (const [name, field, there] of [["rank", "rank_field", adapter], ["prompt_tokens", "prompt_field", !adapter]]) {
    $(field).hidden = $(name).disabled = !there;
  }
}

async function look(event) {
  event.preventDefault();
  changed();
  told("Reading the file…");
  $("examples").replaceChildren();
  try {
    const body = await asked();
    const found = await send("POST", "/api/runs/preview", body);
    $("examples").replaceChildren(...found.examples.map(example));
    told(`${found.notes.join(". ")}. ${found.steps.toLocaleString()} steps.`);
    shown = body;
    $("start").disabled = false;
  } catch (error) {
    told(error.message, true);
  }
}

async function start(after) {
  const body = shown;
  changed();
  try {
    await send("POST", "/api/runs", body);
    told(`${body.name} has begun. It goes on when this page is closed.`);
    $("examples").replaceChildren();
    after();
  } catch (error) {
    told(error.message, true);
  }
}

export function prepare(after) {
  $("train").addEventListener("submit", look);
  $("train").addEventListener("input", changed);
  $("mode").addEventListener("input", fitting);
  fitting(); // a browser may have kept the choice
  $("start").addEventListener("click", () => start(after));
}
