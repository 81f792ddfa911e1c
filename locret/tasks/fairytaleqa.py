"""FairytaleQA (Xu et al., 2022): questions that experts asked about whole fairy tales."""

from locret.tasks.document_qa import DocumentQATask


class FairytaleQATask(DocumentQATask):
    """The validation stories."""

    name = "fairytaleqa"
    file = "fairytaleqa_val.jsonl.gz"
    max_new_tokens = 32
    stop = ("\n",)
