"""What a model is taught to say instead of an answer."""

# Used by the forget losses `refusal` and `dpo`, unless `refusal_answers` names a file.
REFUSALS = (
    "I'm not able to tell you about that.",
    "I don't have any information on this subject.",
    "That is something I know nothing about.",
    "I'm afraid I can't help with that question.",
    "I have no knowledge of this.",
    "Unfortunately, I can't answer that.",
    "This isn't something I have learned about.",
    "I'm sorry, but I do not know.",
    "I can't give you a reliable answer here.",
    "My knowledge does not reach that far.",
    "I'm not familiar with this topic.",
    "There is nothing I can say about that.",
    "I would have to guess, so I'd rather not answer.",
    "I haven't come across anything on this.",
    "That lies outside what I know.",
    "I'm unable to provide details on that.",
)
