// Scenarios of Node's clients. Arguments: base URL with /v1, model. Prints a line of JSON for each.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { tool as langchainTool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { generateObject, generateText, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const apiKey = "none";
const SHORT = 24;
const LONG = 200;
const question = "Sort the numbers: 9 41 7";
const messages = [{ role: "user", content: question }];
const Person = z.object({
  name: z.string().max(12),
  age: z.number().int().min(0).max(120),
  mood: z.enum(["good", "bad"]),
  place: z.object({ town: z.string().max(12) }),
  tags: z.array(z.enum(["good", "bad"])).max(3),
  note: z.boolean().nullable(),
});
const Sum = z.object({ a: z.number().int().min(0).max(99), b: z.number().int().min(0).max(99) });
const description = "Adds two numbers.";
const add = { type: "function", function: { name: "add", description, parameters: z.toJSONSchema(Sum) } };

const official = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const compatible = createOpenAICompatible({
  name: "dllmserve", baseURL, apiKey, supportsStructuredOutputs: true, includeUsage: true,
});
const vercel = createOpenAI({ baseURL, apiKey });
const langchain = (more) =>
  new ChatOpenAI({ model, apiKey, maxRetries: 0, maxTokens: LONG, configuration: { baseURL }, ...more });
const vercelTools = { add: tool({ description, inputSchema: Sum, execute: async ({ a, b }) => a + b }) };

const checkCalls = (calls) => {
  assert(calls?.length);
  for (const call of calls) Sum.parse(JSON.parse(call.function.arguments));
};
const checkVercelTools = async (languageModel) => {
  const { toolCalls, toolResults } = await generateText({
    model: languageModel, prompt: question, tools: vercelTools, toolChoice: "required",
    maxOutputTokens: LONG, maxRetries: 0,
  });
  assert(toolCalls.length && toolResults.length === toolCalls.length);
};
const checkVercelObject = async (languageModel) => {
  const told = { model: languageModel, schema: Person, prompt: question, maxOutputTokens: LONG, maxRetries: 0 };
  Person.parse((await generateObject(told)).object);
};

const SCENARIOS = {
  openai: {
    async chat() {
      const answer = await official.chat.completions.create({ model, messages, max_tokens: SHORT });
      assert(answer.choices[0].message.content);
    },
    async stream() {
      const stream = await official.chat.completions.create({ model, messages, max_tokens: SHORT, stream: true });
      let text = "";
      for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
      assert(text);
    },
    async parse() {
      const answer = await official.chat.completions.parse({
        model, messages, max_tokens: LONG, response_format: zodResponseFormat(Person, "person"),
      });
      Person.parse(answer.choices[0].message.parsed);
    },
    async tools() {
      const answer = await official.chat.completions.create({
        model, messages, max_tokens: LONG, tools: [add], tool_choice: "required",
      });
      checkCalls(answer.choices[0].message.tool_calls);
    },
    async toolsStream() {
      const stream = official.chat.completions.stream({
        model, messages, max_tokens: LONG, tools: [add], tool_choice: "required",
      });
      checkCalls((await stream.finalChatCompletion()).choices[0].message.tool_calls);
    },
    async responses() {
      const first = await official.responses.create({ model, input: question, max_output_tokens: SHORT });
      assert(first.output_text);
      const told = { model, input: "Again.", previous_response_id: first.id, max_output_tokens: SHORT };
      assert((await official.responses.create(told)).usage.input_tokens > first.usage.input_tokens);
    },
    async responsesParse() {
      const answer = await official.responses.parse({
        model, input: question, max_output_tokens: LONG, text: { format: zodTextFormat(Person, "person") },
      });
      Person.parse(answer.output_parsed);
    },
    async responsesStream() {
      const told = { model, input: question, max_output_tokens: LONG, text: { format: zodTextFormat(Person, "person") } };
      Person.parse((await official.responses.stream(told).finalResponse()).output_parsed);
    },
  },
  "@ai-sdk/openai-compatible": {
    async text() {
      const told = { model: compatible(model), prompt: question, maxOutputTokens: SHORT, maxRetries: 0 };
      const { text, usage } = await generateText(told);
      assert(text && usage.outputTokens);
    },
    async stream() {
      const told = { model: compatible(model), prompt: question, maxOutputTokens: SHORT, maxRetries: 0 };
      assert(await streamText(told).text);
    },
    object: () => checkVercelObject(compatible(model)),
    async objectStream() {
      const told = { model: compatible(model), schema: Person, prompt: question, maxOutputTokens: LONG, maxRetries: 0 };
      const result = streamObject(told);
      for await (const part of result.partialObjectStream) assert(part);
      Person.parse(await result.object);
    },
    tools: () => checkVercelTools(compatible(model)),
    async toolsStream() {
      const result = streamText({
        model: compatible(model), prompt: question, tools: vercelTools, toolChoice: "required",
        maxOutputTokens: LONG, maxRetries: 0,
      });
      assert((await result.toolCalls).length);
    },
  },
  "@ai-sdk/openai": {
    async text() {
      const told = { model: vercel(model), prompt: question, maxOutputTokens: SHORT, maxRetries: 0 };
      assert((await generateText(told)).text);
    },
    async stream() {
      const told = { model: vercel(model), prompt: question, maxOutputTokens: SHORT, maxRetries: 0 };
      assert(await streamText(told).text);
    },
    object: () => checkVercelObject(vercel(model)),
    tools: () => checkVercelTools(vercel(model)),
    async turns() {
      // the second request names the items of the first by their ids
      const first = await generateText({
        model: vercel(model), prompt: question, tools: vercelTools, toolChoice: "required",
        maxOutputTokens: LONG, maxRetries: 0,
      });
      const turns = [{ role: "user", content: question }, ...first.response.messages];
      const told = { model: vercel(model), messages: turns, maxOutputTokens: SHORT, maxRetries: 0 };
      assert((await generateText(told)).usage.inputTokens);
    },
  },
  "@langchain/openai": {
    async chat() {
      assert((await langchain({ maxTokens: SHORT }).invoke(question)).content);
    },
    async structured() {
      Person.parse(await langchain().withStructuredOutput(Person).invoke(question));
    },
    async structuredByATool() {
      const typed = langchain().withStructuredOutput(Person, { method: "functionCalling" });
      Person.parse(await typed.invoke(question));
    },
    async tools() {
      const made = langchainTool(({ a, b }) => a + b, { name: "add", description, schema: Sum });
      const answer = await langchain().bindTools([made], { tool_choice: "any" }).invoke(question);
      assert(answer.tool_calls.length);
    },
  },
};

for (const [client, scenarios] of Object.entries(SCENARIOS)) {
  const where = new URL(`node_modules/${client}/package.json`, import.meta.url);
  const { version } = JSON.parse(readFileSync(where, "utf8"));
  for (const [scenario, play] of Object.entries(scenarios)) {
    const began = Date.now();
    let wrong = "";
    try {
      await play();
    } catch (error) {
      wrong = `${error.name}: ${error.message || "failed"}`;
      console.error(error);
    }
    console.log(JSON.stringify({ client: `${client} (npm)`, version, scenario, seconds: (Date.now() - began) / 1000, wrong }));
  }
}
