// Clients from npm, in a folder of their own: what they make of the router's answers.
//
// A program, as `clients_apart.py` is one: it is given the addresses of a router with a demo model and of one whose
// engines play, reads lines `CLIENT CELL`, and answers each with a line of JSON: what the client has made of the
// answer, or what it has thrown. Whether that is right is for `test_agents.py` to say.

import { createInterface } from "node:readline";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { join } from "node:path";

const [router, player, folder] = process.argv.slice(2);
const require = createRequire(join(folder, "package.json"));
const load = (name) => import(pathToFileURL(require.resolve(name)));

const SCHEMA = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};
const TOOL = { type: "function", name: "weather", description: "The weather", parameters: SCHEMA, strict: true };
const LONG = "Hello world ".repeat(20000);
const MESSAGES = [{ role: "user", content: "Hello" }];

async function all(stream) {
  const found = [];
  for await (const each of stream) found.push(each);
  return found;
}

async function thrown(work) {
  try {
    await work();
  } catch (error) {
    return { name: error.constructor.name, status: error.status ?? null, code: error.code ?? null, message: error.message };
  }
  return null;
}

class Openai {
  async client(url = router) {
    const { default: OpenAI } = await load("openai");
    return new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  }

  async responses() {
    const answer = await (await this.client()).responses.create({ model: "demo", input: "Hello", temperature: 0 });
    return answer.output_text;
  }

  async stream() {
    const stream = (await this.client()).responses.stream({ model: "demo", input: "Hello", temperature: 0 });
    const events = await all(stream);
    const final = await stream.finalResponse();
    const deltas = events.filter((event) => event.type === "response.output_text.delta").map((event) => event.delta);
    return { text: final.output_text, deltas, numbers: events.map((event) => event.sequence_number) };
  }

  async tools() {
    const stream = (await this.client(player)).responses.stream({ model: "caller", input: "Hello", tools: [TOOL] });
    await all(stream);
    return (await stream.finalResponse()).output;
  }

  async structured_output() {
    const format = { type: "json_schema", name: "place", schema: SCHEMA, strict: true };
    const asked = { model: "demo", input: "Hello", temperature: 0, text: { format } };
    return JSON.parse((await (await this.client()).responses.create(asked)).output_text);
  }

  async failure() {
    const client = await this.client(player);
    return thrown(async () => all(await client.responses.create({ model: "fails", input: "Hello", stream: true })));
  }

  async too_long() {
    const client = await this.client();
    const messages = [{ role: "user", content: LONG }];
    return thrown(() => client.chat.completions.create({ model: "demo", messages }));
  }
}

class Anthropic {
  async client() {
    const { default: Client } = await load("@anthropic-ai/sdk");
    return new Client({ baseURL: router, apiKey: "none", maxRetries: 0 });
  }

  async chat() {
    const asked = { model: "demo", max_tokens: 100, temperature: 0, messages: MESSAGES };
    return (await (await this.client()).messages.create(asked)).content[0].text;
  }

  async stream() {
    const asked = { model: "demo", max_tokens: 100, temperature: 0, messages: MESSAGES };
    return (await this.client()).messages.stream(asked).finalText();
  }

  async structured_output() {
    const output_config = { format: { type: "json_schema", schema: SCHEMA } };
    const asked = { model: "demo", max_tokens: 100, temperature: 0, messages: MESSAGES, output_config };
    return JSON.parse((await (await this.client()).messages.create(asked)).content[0].text);
  }

  async too_long() {
    const client = await this.client();
    const messages = [{ role: "user", content: LONG }];
    return thrown(() => client.messages.create({ model: "demo", max_tokens: 1, messages }));
  }
}

// Vercel's, with its default provider, which speaks /v1/responses.
class AiSdk {
  async model(name = "demo", url = router) {
    const { createOpenAI } = await load("@ai-sdk/openai");
    return createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" })(name);
  }

  async asked(more = {}, name, url) {
    return { model: await this.model(name, url), prompt: "Hello", temperature: 0, maxRetries: 0, onError() {}, ...more };
  }

  async chat() {
    const { generateText } = await load("ai");
    return (await generateText(await this.asked())).text;
  }

  async stream() {
    const { streamText } = await load("ai");
    const result = streamText(await this.asked());
    const pieces = await all(result.textStream);
    return { pieces, reason: await result.finishReason, tokens: (await result.usage).outputTokens };
  }

  async cut() {
    const { streamText } = await load("ai");
    const result = streamText(await this.asked({ maxOutputTokens: 3 }));
    await all(result.textStream);
    return result.finishReason;
  }

  async tools() {
    const { streamText, tool, jsonSchema } = await load("ai");
    const weather = tool({ description: "The weather", inputSchema: jsonSchema(SCHEMA) });
    const result = streamText(await this.asked({ tools: { weather } }, "caller", player));
    await all(result.fullStream);
    return (await result.toolCalls).map((call) => [call.toolName, call.input]);
  }

  async structured_output() {
    const { generateText, jsonSchema, Output } = await load("ai");
    const output = Output.object({ schema: jsonSchema(SCHEMA) });
    return (await generateText(await this.asked({ output }))).output;
  }

  async failure() {
    const { streamText } = await load("ai");
    const parts = await all(streamText(await this.asked({}, "fails", player)).fullStream);
    const errors = parts.filter((part) => part.type === "error").map((part) => JSON.stringify(part.error) + String(part.error));
    return { errors, reason: parts.findLast((part) => part.type === "finish")?.finishReason ?? null };
  }

  async too_long() {
    const { generateText } = await load("ai");
    return thrown(async () => generateText(await this.asked({ prompt: LONG })));
  }
}

// What opencode and others speak to servers like ours: chats.
class AiSdkCompatible extends AiSdk {
  async model(name = "demo", url = router) {
    const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
    const settings = { name: "router", includeUsage: true, supportsStructuredOutputs: true };
    return createOpenAICompatible({ ...settings, baseURL: `${url}/v1` })(name);
  }
}

const CLIENTS = {
  openai: Openai,
  anthropic: Anthropic,
  "ai-sdk": AiSdk,
  "ai-sdk-compatible": AiSdkCompatible,
};

const answers = process.stdout.write.bind(process.stdout);
process.stdout.write = process.stderr.write.bind(process.stderr); // some clients print
for await (const line of createInterface({ input: process.stdin })) {
  const [client, cell] = line.split(" ");
  let answer;
  try {
    answer = { is: (await new CLIENTS[client]()[cell]()) ?? null };
  } catch (error) {
    answer = { raised: String(error.stack ?? error) };
  }
  answers(JSON.stringify(answer) + "\n");
}
