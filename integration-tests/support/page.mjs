// The page at `/` in headless Chromium: a prompt is typed, the stream is seen, probabilities are shown; a screenshot is kept.
//
//     node integration-tests/support/page.mjs http://127.0.0.1:3000 docs/page.png [chromium]
//
// Needs node 22 or later (for its WebSocket) and a Chromium, which neither the build nor the other tests do.

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [url, screenshot, program = "chromium"] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), "page-"));
const flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", `--user-data-dir=${profile}`,
  "--window-size=1200,760", "about:blank"];
const browser = spawn(program, flags, { stdio: ["ignore", "ignore", "pipe"] });

function fail(what) {
  console.error(what);
  browser.kill();
  process.exit(1);
}
const timer = setTimeout(() => fail("not within 60 s"), 60000);

const address = await new Promise(found => {
  let text = "";
  browser.stderr.on("data", data => {
    text += data;
    const match = text.match(/DevTools listening on (ws:\S+)/);
    if (match) found(match[1]);
  });
  browser.on("exit", () => fail(text));
});
const pages = await (await fetch(`http://${new URL(address).host}/json/list`)).json();
const socket = new WebSocket(pages.find(page => page.type === "page").webSocketDebuggerUrl);
await new Promise(open => socket.addEventListener("open", open));
let number = 0;
const waiting = new Map();
const outside = [];
socket.addEventListener("message", message => {
  const { id, result, error, method, params } = JSON.parse(message.data);
  if (method === "Network.requestWillBeSent" && !params.request.url.startsWith(url)) outside.push(params.request.url);
  if (method === "Runtime.exceptionThrown") fail(JSON.stringify(params.exceptionDetails));
  if (waiting.has(id)) waiting.get(id)(error ?? result);
});
const call = (method, params = {}) => new Promise(answered => {
  waiting.set(++number, answered);
  socket.send(JSON.stringify({ id: number, method, params }));
});
const evaluate = async expression =>
  (await call("Runtime.evaluate", { expression, returnByValue: true, awaitPromise: true })).result.value;
const until = async (expression, what) => {
  for (let n = 0; n < 200; n++) {
    if (await evaluate(expression)) return;
    await new Promise(later => setTimeout(later, 100));
  }
  fail("never: " + what);
};

await call("Network.enable");
await call("Runtime.enable");
await call("Page.enable");
await call("Page.navigate", { url });
await until("document.querySelectorAll('#gauges tr').length > 3", "the server's gauges");
for (const mode of ["text", "chat"]) {
  await evaluate(`document.getElementById("mode-${mode}").click(); document.getElementById("max").value = 48`);
  await evaluate(`document.getElementById("prompt").focus()`);
  await call("Input.insertText", { text: "In the beginning" });
  for (const type of ["keyDown", "keyUp"])
    await call("Input.dispatchKeyEvent", { type, key: "Enter", code: "Enter", windowsVirtualKeyCode: 13, text: "\r" });
  await until("document.querySelectorAll('.assistant .token').length > 8", `tokens with probabilities (${mode})`);
  await until("document.getElementById('send').textContent === 'Send'", `the end of the stream (${mode})`);
  const errors = await evaluate("document.querySelectorAll('.error').length");
  if (errors) fail(await evaluate("document.querySelector('.error').textContent"));
}
const place = await evaluate(`(() => { const box = document.querySelectorAll('.assistant .token')[5].getBoundingClientRect();
  return { x: box.x + box.width / 2, y: box.y + box.height / 2 }; })()`);
await call("Input.dispatchMouseEvent", { type: "mouseMoved", ...place });
await until("document.getElementById('tip').style.display === 'block'", "the probabilities of a token");
if (screenshot) writeFileSync(screenshot, Buffer.from((await call("Page.captureScreenshot")).data, "base64"));
if (outside.length) fail("asked others: " + outside);
clearTimeout(timer);
console.log("the page does what it should");
browser.removeAllListeners("exit");
browser.on("exit", () => {
  rmSync(profile, { recursive: true, force: true });
  process.exit(0);
});
browser.kill();
