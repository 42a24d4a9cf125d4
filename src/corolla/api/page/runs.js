import { prepare } from "/page/start.js";
import { download, get, keyed, send, text } from "/page/talk.js";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [600, 120];

function element(name, words, kind) {
  const made = document.createElement(name);
  if (words) made.textContent = words;
  if (kind) made.className = kind;
  return made;
}

function curve(run) {
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  made.setAttribute("class", "curve");
  made.setAttribute("role", "img");
  const all = [...run.loss, ...run.held_out];
  const losses = all.map((point) => point[1]);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const last = Math.max(1, ...all.map((point) => point[0]));
  made.setAttribute("aria-label", `Loss from ${high.toFixed(3)} to ${low.toFixed(3)} over ${last} steps`);
  for (const [kind, points] of [["training", run.loss], ["held", run.held_out]]) {
    const line = document.createElementNS(SVG, "polyline");
    const at = ([step, loss]) =>
      `${(4 + (step / last) * (WIDTH - 8)).toFixed(1)},${(4 + ((high - loss) / (high - low || 1)) * (HEIGHT - 8)).toFixed(1)}`;
    line.setAttribute("points", points.map(at).join(" "));
    line.setAttribute("class", kind);
    made.append(line);
  }
  return made;
}

function held(run) {
  if (!run.held_out.length) return "";
  const [first, last] = [run.held_out[0][1], run.held_out.at(-1)[1]];
  return `held-out loss ${first.toFixed(3)}${run.held_out.length > 1 ? ` → ${last.toFixed(3)}` : ""}`;
}

function clock(seconds) {
  const minutes = Math.floor(seconds / 60);
  return minutes < 60
    ? `${minutes}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`
    : `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")} h`;
}

function pace(run) {
  if (run.state !== "running" && run.state !== "unfinished") return "";
  const speed = run.tokens_per_second == null ? "" : `${Math.round(run.tokens_per_second).toLocaleString()} tokens/s`;
  const left = run.state !== "running" || run.seconds_left == null ? "" : `${clock(run.seconds_left)} left`;
  return [speed, left].filter(Boolean).join(", ");
}

// What can be done with a run that was started here.
function act(run) {
  const [words, path] = run.state === "stopped" ? ["Go on", "resume"] : ["Stop", "stop"];
  const made = element("button", words);
  made.type = "button";
  made.setAttribute("aria-label", `${words}: ${run.name}`);
  made.addEventListener("click", () => {
    made.disabled = true;
    send("POST", `/api/runs/${encodeURIComponent(run.name)}/${path}`).then(now, failed);
  });
  return made;
}

function section(run) {
  const made = element("section", "", "run");
  made.append(element("h2", run.name));
  const steps = run.step == null ? "" : run.step === run.steps ? `${run.steps} steps` : `${run.step} of ${run.steps} steps`;
  const when = run.saved ? `saved ${new Date(run.saved * 1000).toLocaleString()}` : "";
  made.append(element("p", [run.state, steps, pace(run), held(run), when, run.why].filter(Boolean).join(", ")));
  if (run.loss.length + run.held_out.length > 1) made.append(curve(run));
  if (run.yours && run.state !== "finished") made.append(act(run));
  for (const one of run.samples || []) {
    made.append(element("p", `You: ${one.said}`, "who"), element("p", `Bot: ${one.reply || "(nothing)"}`));
  }
  if (run.report) {
    const link = element("a", "Report");
    link.href = `/api/runs/${encodeURIComponent(run.name)}/report`;
    link.addEventListener("click", (event) => {
      if (!keyed()) return;
      event.preventDefault();
      text(link.href).then((page) => download(`${run.name}.html`, page, "text/html"), failed);
    });
    made.append(link);
  }
  return made;
}

function failed(error) {
  $("state").textContent = error.message;
  $("state").className = "bad";
}

let shown = "";
let ask = true; // once: who wants to give no key is not asked every three seconds
let now = () => {}; // look at once

async function look() {
  try {
    const found = await get("/api/runs", ask);
    const all = JSON.stringify(found);
    if (all === shown) return;
    shown = all;
    $("runs").replaceChildren(...found.map(section));
    $("state").textContent = found.length
      ? `${found.length} run${found.length === 1 ? "" : "s"} in the folder of bundles.`
      : "None yet.";
    $("state").className = "";
  } catch (error) {
    failed(error);
    ask = false;
  }
}

prepare(() => now());
for (;;) {
  if (!document.hidden) await look();
  await new Promise((later) => {
    now = later;
    setTimeout(later, 3000);
  });
}
