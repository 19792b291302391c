# SPDX-License-Identifier: Apache-2.0
"""Training text: reading published files, answering prompts, and its directory format.

A data directory holds `dataset.json` (`DatasetInfo`) and Parquet shards
`part-00000.parquet`, `part-00001.parquet`, ... of rows (`DataRow`): token ids of a
prompt and of the target model's answer, or, for finished text, no prompt and the whole
text as the answer.
"""
