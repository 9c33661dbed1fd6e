// The official `openai` client for Node against a gateway: openai_node.mjs API MODEL
import assert from 'node:assert/strict';
import { load, run, version } from './checks.mjs';

const { default: OpenAI } = await load('openai');
const [api, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: api, apiKey: 'unused', maxRetries: 0 });
const messages = [{ role: 'user', content: 'the light of the river' }];
// The tiny model draws any token, and these have no text: unknown, the begin and the end.
const logit_bias = { 0: -100, 1: -100, 2: -100 };
const lamp = {
  type: 'function',
  function: {
    name: 'set_lamp',
    parameters: {
      type: 'object',
      properties: { room: { enum: ['attic', 'cellar'] }, on: { type: 'boolean' } },
      required: ['room', 'on'],
      additionalProperties: false,
    },
  },
};
const heldToLamp = (text) => {
  const call = JSON.parse(text);
  assert.ok(['attic', 'cellar'].includes(call.room) && typeof call.on === 'boolean', text);
};

await run(`openai ${version('openai')} (Node ${process.versions.node})`, {
  'models are listed and shown': async () => {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    assert.ok(ids.includes(model));
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  'a whole reply': async () => {
    const whole = await client.chat.completions.create({ model, messages, max_completion_tokens: 8, logit_bias });
    assert.equal(whole.choices[0].finish_reason, 'length');
    assert.equal(whole.choices[0].message.refusal, null);
    assert.equal(whole.usage.completion_tokens, 8);
    assert.ok(whole.usage.cost_msat > 0 && whole.usage.receipt_ids.length === 1);
  },
  'a stream, with its usage at the end': async () => {
    const stream = client.chat.completions.stream({
      model, messages, max_tokens: 24, logit_bias, stream_options: { include_usage: true },
    });
    const deltas = [];
    stream.on('content', (delta) => deltas.push(delta));
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, deltas.join(''));
    assert.equal((await stream.totalUsage()).completion_tokens, 24);
  },
  'a schema is held': async () => {
    const json_schema = { name: 'lamp', strict: true, schema: lamp.function.parameters };
    const whole = await client.chat.completions.create({
      model, messages, max_tokens: 200, response_format: { type: 'json_schema', json_schema },
    });
    heldToLamp(whole.choices[0].message.content);
  },
  'a forced tool, whole and streamed': async () => {
    const asked = { model, messages, tools: [lamp], tool_choice: 'required', max_tokens: 200, parallel_tool_calls: false };
    const whole = await client.chat.completions.create(asked);
    assert.equal(whole.choices[0].finish_reason, 'tool_calls');
    heldToLamp(whole.choices[0].message.tool_calls[0].function.arguments);
    const final = await client.chat.completions.stream(asked).finalMessage();
    heldToLamp(final.tool_calls[0].function.arguments);
  },
  'tools are run by the client until it has called once': async () => {
    let ran = 0;
    const runner = client.chat.completions.runTools(
      {
        model, messages, max_tokens: 200, parallel_tool_calls: false,
        tool_choice: { type: 'function', function: { name: 'set_lamp' } },
        tools: [{ type: 'function', function: { ...lamp.function, parse: JSON.parse, function: () => { ran += 1; return 'done'; } } }],
      },
    );
    await runner.done();
    assert.equal(ran, 1);
  },
  'several replies with logprobs': async () => {
    const whole = await client.chat.completions.create({
      model, messages, n: 2, max_tokens: 4, logprobs: true, top_logprobs: 3, logit_bias,
    });
    assert.deepEqual(whole.choices.map((choice) => choice.index), [0, 1]);
    assert.equal(whole.choices[1].logprobs.content[0].top_logprobs.length, 3);
  },
  'text completions, whole and streamed': async () => {
    const whole = await client.completions.create({ model, prompt: 'the river', max_tokens: 5 });
    assert.equal(whole.object, 'text_completion');
    let text = '';
    for await (const piece of await client.completions.create({ model, prompt: 'the river', max_tokens: 5, stream: true })) {
      text += piece.choices[0].text;
    }
    assert.ok(text);
  },
  'responses, whole and as events': async () => {
    const whole = await client.responses.create({ model, input: 'the river', max_output_tokens: 8 });
    assert.ok(typeof whole.output_text === 'string' && whole.usage.cost_msat > 0);
    const stream = client.responses.stream({ model, input: 'the river', max_output_tokens: 24 });
    let text = '';
    stream.on('response.output_text.delta', (event) => { text += event.delta; });
    assert.equal((await stream.finalResponse()).output_text, text);
  },
  'refusals are errors of the client': async () => {
    await assert.rejects(client.chat.completions.create({ model: 'no-such-model', messages }), (error) =>
      error instanceof OpenAI.NotFoundError && error.code === 'model_not_found');
    await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), (error) =>
      error instanceof OpenAI.BadRequestError && error.param === 'temperature' && Boolean(error.requestID));
  },
  'a client that leaves early': async () => {
    const stream = await client.chat.completions.create({ model, messages, max_tokens: 1000, stream: true, logit_bias });
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) break;
    }
    assert.ok(stream.controller.signal.aborted);
    assert.ok((await client.chat.completions.create({ model, messages, max_tokens: 2 })).id);
  },
});
