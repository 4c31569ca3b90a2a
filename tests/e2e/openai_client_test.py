"""The official openai client, unmodified, against `octavo serve` with the shipped model.

openai_client_test.py PROGRAM
"""
import sys
import unittest

import openai

from served import PROMPT, Server

PROGRAM = sys.argv.pop(1)
MESSAGES = [{"role": "user", "content": PROMPT}]


def connect(server, key="none"):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=60)


class OpenAIClientTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(PROGRAM, "--kv-cache-dtype", "fp8",
                            "--trust-request-chat-template")
        cls.client = connect(cls.server)

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def test_models(self):
        (model,) = self.client.models.list().data
        self.assertEqual(model.id, "needle")

    def test_chat(self):
        answer = self.client.chat.completions.create(
            model="needle", messages=MESSAGES, temperature=0, logprobs=True)
        (choice,) = answer.choices
        self.assertEqual(choice.message.content, "123456.")
        self.assertEqual(choice.finish_reason, "stop")
        self.assertEqual(answer.usage.total_tokens,
                         answer.usage.prompt_tokens + answer.usage.completion_tokens)
        self.assertEqual(len(choice.logprobs.content), answer.usage.completion_tokens)
        self.assertLessEqual(max(token.logprob for token in choice.logprobs.content), 0)

    def test_prompt_of_a_chat(self):
        def text(messages, **extra):
            return self.client.chat.completions.create(
                model="needle", messages=messages, temperature=0,
                extra_body=extra).choices[0].message.content
        begun = [*MESSAGES, {"role": "assistant", "content": "123"}]
        self.assertEqual(text(begun, continue_final_message=True), "456.")
        self.assertEqual(text(begun, continue_final_message=True, echo=True), "123456.")
        self.assertEqual(text(MESSAGES, echo=True), "123456.")  # another role's
        template = "{{ messages[1].content }}"
        self.assertEqual(text([*MESSAGES, *MESSAGES], chat_template=template), "123456.")
        with self.assertRaises(openai.BadRequestError) as refused:
            text(MESSAGES, chat_template="{{ oops")
        self.assertEqual(refused.exception.param, "chat_template")

    def test_chat_streamed(self):
        text, usage = "", None
        for chunk in self.client.chat.completions.create(
                model="needle", messages=MESSAGES, temperature=0, stream=True,
                stream_options={"include_usage": True}):
            for choice in chunk.choices:
                text += choice.delta.content or ""
            usage = chunk.usage or usage
        self.assertEqual(text, "123456.")
        self.assertEqual(usage.completion_tokens, 8)

    def test_completions(self):
        whole = self.client.completions.create(
            model="needle", prompt=PROMPT, temperature=0, logprobs=0)
        self.assertEqual(whole.choices[0].text, "123456.")
        self.assertEqual("".join(whole.choices[0].logprobs.tokens)[:7], "123456.")
        streamed = self.client.completions.create(
            model="needle", prompt=PROMPT, temperature=0, stream=True)
        self.assertEqual("".join(c.text for chunk in streamed for c in chunk.choices), "123456.")

    def test_sampling_fields(self):
        def text(**fields):
            return self.client.completions.create(
                model="needle", prompt=PROMPT, **{"temperature": 0, **fields}).choices[0].text
        self.assertEqual(text(stop=["45"]), "123")
        self.assertEqual(text(stop="45", extra_body={"include_stop_str_in_output": True}), "12345")
        self.assertNotIn("1", text(logit_bias={str(ord("1")): -100}, max_tokens=4)[:1])
        sampled = [text(temperature=1.5, seed=7, max_tokens=12) for _ in range(2)]
        self.assertEqual(sampled[0], sampled[1])

    def test_choices(self):
        fields = dict(model="needle", prompt="Once", n=3, temperature=1.5, max_tokens=12,
                      extra_body={"ignore_eos": True})
        whole = self.client.completions.create(seed=7, **fields)
        texts = [choice.text for choice in whole.choices]
        self.assertEqual(len(set(texts)), 3)
        self.assertEqual(whole.usage.completion_tokens, 36)
        streamed = [""] * 3
        for chunk in self.client.completions.create(seed=7, stream=True, **fields):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
        self.assertEqual(streamed, texts)

    def test_alternatives(self):
        answer = self.client.chat.completions.create(
            model="needle", messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3)
        for token in answer.choices[0].logprobs.content:
            self.assertEqual(len(token.top_logprobs), 3)
            self.assertEqual(token.top_logprobs[0].token, token.token)  # greedy
            self.assertEqual(token.top_logprobs[0].logprob, token.logprob)
        whole = self.client.completions.create(
            model="needle", prompt=PROMPT, temperature=0, logprobs=3)
        logprobs = whole.choices[0].logprobs
        for token, top in zip(logprobs.tokens, logprobs.top_logprobs):
            self.assertEqual(max(top, key=top.get), token)
        streamed = list(self.client.completions.create(
            model="needle", prompt=PROMPT, temperature=0, logprobs=3, stream=True))
        self.assertEqual([top for chunk in streamed if chunk.choices[0].logprobs
                          for top in chunk.choices[0].logprobs.top_logprobs], logprobs.top_logprobs)

    # What is scored with echo is what was generated, also where the prefix is in the cache.
    def test_echo_and_prompt_logprobs(self):
        create = self.client.completions.create
        text = create(model="needle", prompt=PROMPT * 2, temperature=0, max_tokens=6,
                      logprobs=2).choices[0]
        for stream in False, True:
            scored = create(model="needle", prompt=PROMPT * 2 + text.text, max_tokens=0, echo=True,
                            logprobs=2, extra_body={"prompt_logprobs": 1}, stream=stream)
            (choice,) = [c for chunk in (scored if stream else [scored]) for c in chunk.choices]
            self.assertEqual(choice.text, PROMPT * 2 + text.text)
            self.assertEqual(choice.finish_reason, "length")
            logprobs = choice.logprobs
            self.assertEqual("".join(logprobs.tokens), "<bos>" + choice.text)
            self.assertEqual(logprobs.text_offset, [0, *range(len(choice.text))])
            self.assertIsNone(logprobs.token_logprobs[0])
            for ours, generated in zip(logprobs.token_logprobs[-6:], text.logprobs.token_logprobs):
                self.assertAlmostEqual(ours, generated, delta=1e-5)
            prompt_logprobs = choice.model_extra["prompt_logprobs"]
            self.assertEqual(len(prompt_logprobs), len(logprobs.tokens))
            self.assertIsNone(prompt_logprobs[0])
            for token, logprob, entry in zip(logprobs.tokens[1:], logprobs.token_logprobs[1:],
                                             prompt_logprobs[1:]):
                first = next(iter(entry.values()))
                self.assertEqual((first["decoded_token"], first["logprob"]), (token, logprob))
                self.assertIn(1, [one["rank"] for one in entry.values()])

    def test_several_prompts(self):
        prompts = ["The code of", [65, 66, 67], PROMPT]
        fields = dict(model="needle", temperature=0, max_tokens=5)
        alone = [self.client.completions.create(prompt=prompt, **fields) for prompt in prompts[:2]]
        whole = self.client.completions.create(prompt=prompts[:1] + prompts[2:], n=2, **fields)
        texts = [choice.text for choice in whole.choices]
        self.assertEqual([choice.index for choice in whole.choices], [0, 1, 2, 3])
        self.assertEqual(texts[:2], [alone[0].choices[0].text] * 2)
        self.assertEqual(texts[2:], ["12345"] * 2)
        ids = self.client.completions.create(prompt=[prompts[1], prompts[1]], echo=True, **fields)
        self.assertEqual([choice.text for choice in ids.choices],
                         ["ABC" + alone[1].choices[0].text] * 2)
        self.assertEqual(ids.usage.prompt_tokens, 6)
        streamed = [""] * 2
        for chunk in self.client.completions.create(
                prompt=[prompts[0], prompts[2]], stream=True, **fields):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
        self.assertEqual(streamed, [alone[0].choices[0].text, "12345"])

    def test_cached_tokens(self):
        prompt = PROMPT * 3
        create = lambda: self.client.completions.create(  # noqa: E731
            model="needle", prompt=prompt, max_tokens=1).usage
        create()
        self.assertGreaterEqual(create().prompt_tokens_details.cached_tokens, 64)

    def test_errors(self):
        with self.assertRaises(openai.BadRequestError) as refused:
            self.client.chat.completions.create(model="needle", messages=MESSAGES, top_p=0)
        self.assertEqual(refused.exception.param, "top_p")
        with self.assertRaises(openai.BadRequestError) as refused:
            self.client.completions.create(model="needle", prompt="x", n=0)
        self.assertEqual(refused.exception.param, "n")
        with self.assertRaises(openai.BadRequestError) as refused:
            self.client.chat.completions.create(
                model="needle", messages=MESSAGES, max_completion_tokens=1_000_000)
        self.assertEqual(refused.exception.param, "max_completion_tokens")
        with self.assertRaises(openai.NotFoundError):
            self.client.completions.create(model="gpt-9", prompt="x")

    def test_key(self):
        server = Server(PROGRAM, "--api-key", "secret")
        try:
            with self.assertRaises(openai.AuthenticationError):
                connect(server, "wrong").models.list()
            self.assertEqual(len(connect(server, "secret").models.list().data), 1)
        finally:
            server.stop()


if __name__ == "__main__":
    unittest.main()
