// The Vercel AI SDK against a gateway, by both of its providers: ai_sdk.mjs API MODEL
import assert from 'node:assert/strict';
import { load, run, version } from './checks.mjs';

const { APICallError, Output, generateText, stepCountIs, streamText, tool } = await load('ai');
const { createOpenAI } = await load('@ai-sdk/openai');
const { createOpenAICompatible } = await load('@ai-sdk/openai-compatible');
const { z } = await load('zod');
const [baseURL, name] = process.argv.slice(2);
const official = createOpenAI({ baseURL, apiKey: 'unused' });
const compatible = createOpenAICompatible({
  name: 'satgrid', baseURL, apiKey: 'unused', includeUsage: true, supportsStructuredOutputs: true,
});
const lamp = z.object({ room: z.enum(['attic', 'cellar']), on: z.boolean() });
const prompt = 'the light of the river';
const checks = {};

for (const [kind, model] of Object.entries({
  'openai.chat': official.chat(name),
  'openai.responses': official.responses(name),
  'openai-compatible': compatible(name),
})) {
  // One call: a model of random weights may otherwise call until it meets its length.
  const providerOptions = { openai: { parallelToolCalls: false }, satgrid: { parallel_tool_calls: false } };
  const asked = { model, prompt, maxRetries: 0, providerOptions };
  checks[`${kind}: text and usage`] = async () => {
    const { text, usage, finishReason } = await generateText({ ...asked, maxOutputTokens: 8, seed: 3 });
    assert.ok(typeof text === 'string' && usage.inputTokens > 0 && usage.outputTokens > 0);
    assert.ok(['length', 'stop'].includes(finishReason));
  };
  checks[`${kind}: a stream`] = async () => {
    const result = streamText({ ...asked, maxOutputTokens: 24, seed: 4 });
    let text = '';
    for await (const delta of result.textStream) text += delta;
    assert.equal(await result.text, text);
    assert.ok((await result.usage).outputTokens > 0);
  };
  checks[`${kind}: an object by a schema`] = async () => {
    const { output } = await generateText({ ...asked, maxOutputTokens: 200, output: Output.object({ schema: lamp }) });
    lamp.parse(output);
  };
  checks[`${kind}: a forced tool, and its result goes back`] = async () => {
    const called = [];
    const set_lamp = tool({ description: 'switches a lamp', inputSchema: lamp, execute: (input) => { called.push(input); return 'done'; } });
    const { steps } = await generateText({
      ...asked, maxOutputTokens: 200, tools: { set_lamp }, toolChoice: 'required', stopWhen: stepCountIs(2),
      prepareStep: ({ stepNumber }) => (stepNumber > 0 ? { toolChoice: 'none' } : {}),
    });
    assert.equal(steps[0].finishReason, 'tool-calls');
    called.forEach((input) => lamp.parse(input));
    assert.ok(called.length >= 1 && steps.length === 2);
  };
  checks[`${kind}: a forced tool, streamed`] = async () => {
    const set_lamp = tool({ inputSchema: lamp });
    const result = streamText({ ...asked, maxOutputTokens: 200, tools: { set_lamp }, toolChoice: { type: 'tool', toolName: 'set_lamp' } });
    const kinds = new Set();
    for await (const part of result.fullStream) kinds.add(part.type);
    assert.ok(kinds.has('tool-input-delta') && kinds.has('tool-call'), [...kinds].join(' '));
    lamp.parse((await result.toolCalls)[0].input);
  };
  checks[`${kind}: refusals`] = async () => {
    await assert.rejects(generateText({ ...asked, temperature: 9 }), (error) =>
      APICallError.isInstance(error) && error.statusCode === 400 && !error.isRetryable);
  };
}

await run(`ai ${version('ai')}`, checks);
