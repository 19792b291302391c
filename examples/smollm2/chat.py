# SPDX-License-Identifier: Apache-2.0
"""A chat with a served model, streamed, as any client of OpenAI's API does it.

python chat.py "How do I cook rice so that it does not stick?"
"""

import argparse

from openai import OpenAI


def main() -> None:
    """Ask one question and print the answer as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--max-tokens", type=int, default=256)
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none")
    (model,) = client.models.list().data
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=arguments.max_tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
