// The same as clients.py with Vercel's packages: `node clients.mjs FOLDER URL < images.json`, where the folder's
// node_modules hold `ai`, `@ai-sdk/openai-compatible` and `@ai-sdk/openai`.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, url] = process.argv.slice(2);
const require = createRequire(pathToFileURL(join(modules, "x.js")));
const { generateText, streamText } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { createOpenAI } = require("@ai-sdk/openai");
const { safe, unsafe } = JSON.parse(readFileSync(0, "utf-8"));

const user = (image) => ({
  role: "user",
  content: [
    { type: "text", text: "Where is the square?" },
    { type: "image", image },
  ],
});
const compatible = createOpenAICompatible({ name: "local", baseURL: `${url}/v1`, apiKey: "sk-none", includeUsage: true });
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "sk-none" });
const found = {};
for (const [name, model] of [
  ["", compatible("fake")],
  ["response ", openai.responses("fake")],
]) {
  const common = { model, maxRetries: 0, providerOptions: { openai: { store: false } } }; // items, not their ids
  const asked = await generateText({ ...common, messages: [user(safe)] });
  found[`${name}asked`] = asked.text;
  let streamed = "";
  const stream = streamText({ ...common, messages: [user(safe)], onError: ({ error }) => { throw error; } });
  for await (const piece of stream.textStream) streamed += piece;
  found[`${name}streamed`] = streamed;
  const turns = [user(safe), ...asked.response.messages, { role: "user", content: "And its color?" }];
  found[`${name}second`] = (await generateText({ ...common, messages: turns })).text;
  const refused = await generateText({ ...common, messages: [user(unsafe)] });
  found[`${name}refused`] = [refused.finishReason, refused.text];
}
console.log(JSON.stringify(found));
