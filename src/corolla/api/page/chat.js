import { rendered } from "/page/markdown.js";
import { download, get, reply, send, text } from "/page/talk.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let id = null;
let columns = [{ model: "", messages: [] }];
let stopping = null; // while replies come
let shown = []; // of each column, the element of its last reply

const fresh = () => crypto.getRandomValues(new Uint32Array(4)).reduce((word, part) => word + part.toString(16), "");
const notice = (words) => ($("notice").textContent = words);

// --- drawing ------------------------------------------------------------------------------------------------

function button(words, label, act, pressed) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = words;
  made.setAttribute("aria-label", label);
  if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", act);
  return made;
}

function turn(column, place) {
  const message = column.messages[place];
  const made = document.createElement("article");
  made.className = `turn ${message.role}`;
  const who = document.createElement("p");
  who.className = "who";
  who.textContent = message.role === "user" ? "You" : column.model;
  const said = document.createElement("div");
  said.className = "said";
  said.append(...rendered(message.content));
  const acts = document.createElement("div");
  acts.className = "acts";
  if (message.role === "user") acts.append(button("Edit", "Edit this message in a new branch", () => edit(place)));
  else {
    acts.append(
      button("Good", "Good reply", () => rate(message, 1), message.rating === 1),
      button("Bad", "Bad reply", () => rate(message, -1), message.rating === -1),
      button("Copy", "Copy this reply", () => navigator.clipboard.writeText(message.content)),
    );
    if (place === column.messages.length - 1) {
      acts.append(button("Regenerate", "Regenerate this reply", () => regenerate(column)));
    }
  }
  made.append(who, said, acts);
  return made;
}

function draw() {
  shown = [];
  $("columns").replaceChildren(
    ...columns.map((column, index) => {
      const made = document.createElement("section");
      made.className = "column";
      made.setAttribute("aria-label", column.model);
      if (columns.length > 1) {
        const heading = document.createElement("h2");
        heading.textContent = column.model;
        made.append(heading);
      }
      made.append(...column.messages.map((_, place) => turn(column, place)));
      shown[index] = made.lastElementChild;
      return made;
    }),
  );
  $("columns").scrollTop = $("columns").scrollHeight;
  $("title").textContent = titled();
  summarise();
}

function summarise() {
  const words = columns.map((column) => column.model);
  for (const name of NUMBERS) if ($(name).value) words.push(`${name} ${$(name).value}`);
  if ($("system").value) words.push("system prompt");
  $("summary").textContent = words.join(", ");
}

const titled = () => columns[0].messages[0]?.content.slice(0, 60) || "New conversation";

// --- talking ------------------------------------------------------------------------------------------------

function settings() {
  const found = {};
  for (const name of NUMBERS) if ($(name).value !== "") found[name] = Number($(name).value);
  return found;
}

async function one(column, index, signal) {
  const system = $("system").value.trim();
  const messages = column.messages.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const message = { role: "assistant", content: "", rating: 0 };
  column.messages.push(message);
  draw();
  const element = shown[index];
  element.classList.add("busy");
  let waiting = false;
  const show = () => {
    waiting = false;
    element.querySelector(".said").replaceChildren(...rendered(message.content));
    $("columns").scrollTop = $("columns").scrollHeight;
  };
  try {
    for await (const part of reply({ model: column.model, messages, ...settings() }, signal)) {
      message.content += part.choices[0]?.delta?.content || "";
      if (!waiting) {
        waiting = true;
        requestAnimationFrame(show);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
  }
  if (!message.content) column.messages.pop();
}

async function talk(which) {
  stopping = new AbortController();
  notice("");
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    await Promise.all(which.map((column) => one(column, columns.indexOf(column), stopping.signal)));
  } finally {
    stopping = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    draw();
    await save();
  }
}

async function say(words) {
  if (stopping || !words.trim()) return;
  for (const column of columns) column.messages.push({ role: "user", content: words, rating: 0 });
  $("say").value = "";
  await talk(columns);
}

async function regenerate(column) {
  if (stopping) return;
  column.messages.pop();
  await talk([column]);
}

function edit(place) {
  if (stopping) return;
  const words = columns[0].messages[place].content;
  // The conversation as it is stays; what follows is a branch of its own.
  id = null;
  columns = columns.map((column) => ({ model: column.model, messages: column.messages.slice(0, place) }));
  draw();
  $("say").value = words;
  $("say").focus();
}

async function rate(message, rating) {
  message.rating = message.rating === rating ? 0 : rating;
  draw();
  await save();
}

// --- conversations that stay --------------------------------------------------------------------------------

async function save() {
  if (!columns.some((column) => column.messages.length)) return;
  id = id || fresh();
  const body = { title: titled(), system: $("system").value, settings: settings(), columns };
  try {
    await send("PUT", `/api/conversations/${id}`, body);
    history.replaceState(null, "", `#${id}`);
    await list();
  } catch (error) {
    notice(error.message);
  }
}

async function list() {
  const found = await get("/api/conversations");
  $("list").replaceChildren(
    ...found.map((about) => {
      const item = document.createElement("li");
      const made = button(about.title, `Open: ${about.title}`, () => open(about.id));
      if (about.id === id) made.setAttribute("aria-current", "true");
      item.append(made);
      return item;
    }),
  );
}

async function open(name) {
  if (stopping) stopping.abort();
  try {
    const found = await get(`/api/conversations/${name}`);
    id = name;
    columns = found.columns;
    $("system").value = found.system;
    for (const field of NUMBERS) $(field).value = found.settings[field] ?? "";
    $("model").value = columns[0].model;
    $("other").value = columns[1]?.model || "";
    history.replaceState(null, "", `#${id}`);
  } catch (error) {
    notice(error.message);
  }
  closed();
  draw();
  await list();
}

function begin() {
  if (stopping) stopping.abort();
  id = null;
  history.replaceState(null, "", "/");
  choose();
  closed();
  $("say").focus();
  list().catch((error) => notice(error.message));
}

function choose() {
  const names = [$("model").value, $("other").value].filter(Boolean);
  columns = names.map((model, index) => ({ model, messages: columns[index]?.model === model && id ? columns[index].messages : [] }));
  draw();
}

function closed() {
  $("side").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
}

const guarded = (act) => (...given) => Promise.resolve(act(...given)).catch((error) => notice(error.message));

// --- wiring -------------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(say)($("say").value);
});
$("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    guarded(say)($("say").value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (stopping) stopping.abort();
  else closed();
});
$("stop").addEventListener("click", () => stopping?.abort());
$("new").addEventListener("click", begin);
$("menu").addEventListener("click", () => {
  const open = $("side").classList.toggle("open");
  $("menu").setAttribute("aria-expanded", String(open));
});
for (const name of ["model", "other"]) {
  $(name).addEventListener("change", () => {
    id = null; // with others it is another conversation
    choose();
  });
}
for (const name of [...NUMBERS, "system"]) $(name).addEventListener("input", summarise);
$("export").addEventListener("click", guarded(async () => download("conversations.json", await text("/api/export"))));
$("rated").addEventListener("click", guarded(async () => download("rated.jsonl", await text("/api/rated"))));
$("delete").addEventListener("click", guarded(async () => {
  if (!id || !confirm("Delete this conversation?")) return;
  await send("DELETE", `/api/conversations/${id}`);
  begin();
}));
$("import").addEventListener("change", guarded(async (event) => {
  const content = JSON.parse(await event.target.files[0].text());
  const found = await send("POST", "/api/import", content);
  notice(`${found.count} conversations imported.`);
  await list();
}));

guarded(async () => {
  const models = (await get("/v1/models")).data.map((one) => one.id);
  $("model").replaceChildren(...models.map((name) => new Option(name, name)));
  $("other").replaceChildren(new Option("nobody", ""), ...models.map((name) => new Option(name, name)));
  choose();
  await list();
  const name = location.hash.slice(1);
  if (name) await open(name);
})();
