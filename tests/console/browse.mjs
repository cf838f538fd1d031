// Uses the console as a person does, in a headless Chromium. Arguments: the browser, the console, its token, the
// simulator's admin address, and a folder for pictures.
//
// Prints the name of each thing that somebody else has to do, and goes on when a line comes on standard input.
// Anything that is not as it should be ends it with an error.

import assert from "node:assert/strict";
import { writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import process from "node:process";
import { createInterface } from "node:readline";

const require = createRequire(`${process.env.NPM}/`);
const { chromium } = require("playwright-core");
const jsQR = require("jsqr");
const { PNG } = require("pngjs");

const [executablePath, url, token, admin, pictures] = process.argv.slice(2);
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const patience = { timeout: 60_000 }; // only ends what hangs
const sizes = { desk: { width: 1280, height: 900 }, phone: { width: 380, height: 844 } };
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
const faults = [];

async function asked(what) {
  console.log(what);
  assert.equal((await lines.next()).value, "done");
}

async function simulator(call, body) {
  const answer = await fetch(`${admin}/${call}`, body && { method: "POST", body: JSON.stringify(body) });
  assert.ok(answer.ok, await answer.clone().text());
  return answer.json();
}

async function opened(options = {}) {
  const context = await browser.newContext({ viewport: sizes.desk, ...options });
  context.setDefaultTimeout(patience.timeout);
  const page = await context.newPage();
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (said) => {
    // a page that is refused or fails is told to the person, too
    if (said.type() === "error" && !said.text().startsWith("Failed to load resource")) faults.push(said.text());
  });
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !request.url().startsWith("data:")) faults.push(request.url());
  });
  await page.goto(url);
  return page;
}

async function signIn(page) {
  await page.fill("#token", token);
  await page.click("text=Sign in");
  await page.waitForSelector("h1:text('Bindings')");
}

// By the protocol of the browser itself: playwright's own way puts a style into the page, which the page forbids.
async function picture(page, name) {
  const session = await page.context().newCDPSession(page);
  const { data } = await session.send("Page.captureScreenshot", { format: "png" });
  await session.detach();
  const png = Buffer.from(data, "base64");
  await writeFile(`${pictures}/${name}.png`, png);
  return png;
}

async function pictured(page, name) {
  for (const [size, viewport] of Object.entries(sizes)) {
    await page.setViewportSize(viewport);
    const [wide, shown] = await page.evaluate(() => [document.scrollingElement.scrollWidth, innerWidth]);
    assert.ok(wide <= shown, `${name} is wider than a ${size}: ${wide} of ${shown}`);
    await picture(page, `${name}-${size}`);
  }
  await page.setViewportSize(sizes.desk);
}

async function startsLogin(page, sandbox) {
  await page.goto(`${url}/logins`);
  await page.fill("input[name=sandbox]", sandbox);
  await page.click("text=Show a QR code");
  await page.waitForSelector(".code svg");
  return (await simulator("qrcodes")).at(-1).qrcode;
}

// The wrong token, and nothing there yet.
const page = await opened();
await page.fill("#token", "not the token at all");
await page.click("text=Sign in");
await page.waitForSelector("text=This is not the token.");
await pictured(page, "sign-in");
await signIn(page);
await page.waitForSelector("text=No bindings yet");
await pictured(page, "empty");

// Full: what is there is shown without loading the page again, and what changes, too.
await page.evaluate(() => (window.same = true));
await asked("fill");
await page.waitForSelector("td b:text('agent-000')");
await page.waitForSelector(".badge.bad:text('needs a login')");
assert.equal(await page.locator("tbody tr").count(), 50);
await pictured(page, "bindings");
const row = page.locator("tr", { hasText: "agent-007" });
await row.locator("td[data-name='User wrote']:has-text('never')").waitFor();
const [{ user }] = (await simulator("bots")).filter((bot) => bot.bot.startsWith("agent-007"));
await simulator("say", { to: user, text: "你好" });
await row.locator("td[data-name='User wrote'] time").waitFor();
assert.equal(await page.evaluate(() => window.same), true);

// Find, leaf, and words that nothing matches.
await page.goto(url);
await page.click("text=Next");
await page.waitForSelector("text=Page 2 of 3");
await page.fill("input[name=q]", "张三");
await page.click("text=Find");
await page.waitForSelector("text=Nothing matches “张三”");
await pictured(page, "no-match");
const dark = await opened({ colorScheme: "dark" });
await signIn(dark);
await pictured(dark, "dark");

// In Chinese, as a browser asks for it, and back by the link.
const chinese = await opened({ locale: "zh-CN" });
await pictured(chinese, "zh-sign-in");
await chinese.fill("#token", token);
await chinese.click("button");
await chinese.waitForSelector(".badge.bad:text('需要登录')");
await pictured(chinese, "zh-bindings");
await chinese.click("nav >> text=死信");
await chinese.waitForSelector("h1:text('死信')");
await pictured(chinese, "zh-dead-letters");
await chinese.click("nav >> text=登录");
await chinese.fill("input[name=sandbox]", "zh-agent");
await pictured(chinese, "zh-logins");
await chinese.click("text=显示二维码");
await chinese.waitForSelector(".code svg");
await pictured(chinese, "zh-login");
await chinese.click("text=取消登录");
await chinese.waitForSelector("text=已取消");
await pictured(chinese, "zh-cancelled");
await chinese.click("header >> text=English");
await chinese.waitForSelector("text=Start another");

// Dead letters: one is tried again, one dropped.
await page.click("nav >> text=Dead letters");
await page.waitForSelector("h1:text('Dead letters')");
await pictured(page, "dead-letters");
assert.equal(await page.locator("tbody tr").count(), 3);
await page.click("tbody tr:last-child >> text=Try again");
await page.waitForSelector("text=Letter 1 is stored again on wechat.out.agent-000.");
await page.waitForFunction(() => document.querySelectorAll("tbody tr").length >= 2);
await page.click("tbody tr >> nth=0 >> text=Drop");
await page.waitForSelector("text=is dropped.");

// A login: a camera reads the code, in a dark page, too; typed digits are not lost while the page looks for news.
const code = await startsLogin(page, "new-agent");
assert.ok(!page.url().includes(code));
await pictured(page, "login");
const address = page.url();
await dark.goto(address);
const { width, height, data } = PNG.sync.read(await picture(dark, "login-dark"));
const read = jsQR(new Uint8ClampedArray(data), width, height);
assert.ok(read?.data.includes(code), "the code can be read");
const still = await opened({ javaScriptEnabled: false, storageState: await page.context().storageState() });
await still.goto(address);
await still.waitForSelector(".code svg");
await simulator("require_verify", { qrcode: code, code: "4711" });
await simulator("scan", { qrcode: code });
await page.fill(".digits", "47");
for (let look = 0; look < 3; look += 1) {
  await page.waitForResponse(address);
}
assert.equal(await page.inputValue(".digits"), "47");
await pictured(page, "digits");
await page.fill(".digits", "1111");
await page.click("text=Send digits");
await page.waitForSelector("text=type them once more");
await page.fill(".digits", "4711");
await page.click("text=Send digits");
await page.waitForSelector("text=Waiting for the person to confirm.");
await still.waitForSelector("text=Waiting for the person to confirm."); // without scripts, too
await simulator("confirm", { qrcode: code });
await page.waitForSelector(".big.good");
await pictured(page, "bound");
await page.click("text=Show the binding");
await page.waitForSelector("td b:text('new-agent')");

// A login that is cancelled, and the way out.
await startsLogin(page, "another-agent");
await page.click("text=Cancel the login");
await page.waitForSelector("text=Cancelled");
await pictured(page, "cancelled");
assert.deepEqual(faults, []);

// Without NATS: what was shown stays and says so, a new page says what is wrong.
await page.goto(url);
await page.waitForSelector("h1:text('Bindings')");
await asked("outage");
await page.waitForSelector("#silent:not([hidden])");
await pictured(page, "silent");
await page.goto(`${url}/dead`);
await page.waitForSelector("text=The bus does not answer");
await pictured(page, "outage");
await page.click("text=Sign out");
await page.waitForSelector("#token");
assert.deepEqual(faults, []);
await browser.close();
process.exit(0);
