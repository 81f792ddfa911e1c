"""QMSum (Zhong et al., 2021): queries about meetings, on the stretch of the transcript that answers
them.

The request is worded as in LongBench (Bai et al., 2023), which asks about whole meetings.
"""

from locret.tasks.document_qa import DocumentQATask


class QMSumTask(DocumentQATask):
    """The validation meetings."""

    name = "qmsum"
    file = "qmsum_windowed_val.jsonl.gz"
    before = (
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n"
    )
    asked = (
        "\n\nNow, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\nQuery: "
    )
    after = "\nAnswer:"
    max_new_tokens = 160  # 9 in 10 references have at most 100 words
