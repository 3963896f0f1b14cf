/* ChatML of Qwen3 and harmony of gpt-oss, message by message, after the templates that those models were published with. */
#include "io/chat.h"

#include "core/status.h"

#include <stdlib.h>
#include <string.h>

/* A part of somebody's text. */
typedef struct span {
    const char *p;
    size_t n;
} span;

/* Tokens so far, and the plain text behind them: text between two control tokens is encoded as one, as a template's reader would. */
typedef struct writer {
    const esp_tokenizer *tokenizer;
    espi_chat_ids *out;
    char *text;
    size_t n_text, text_room;
} writer;

/* A conversation with the answer as its last message. */
typedef struct conversation {
    const json_t *messages; /* those of the line */
    size_t n;               /* with the answer */
    span given;             /* the answer's text where it is no message; p NULL: it is one, or there is none */
    bool answered;
    espi_chat_options options;
} conversation;

static span whole(const char *text) {
    return (span){text, strlen(text)};
}

/* ---- writing ---- */

static esp_status put(writer *w, span s) {
    if (w->n_text + s.n > w->text_room) {
        const size_t room = 2 * w->text_room + s.n + 64;
        char *text = realloc(w->text, room);
        if (!text) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a message of %zu bytes", room);
        w->text = text;
        w->text_room = room;
    }
    if (s.n) memcpy(w->text + w->n_text, s.p, s.n);
    w->n_text += s.n;
    return ESP_OK;
}

static esp_status flush(writer *w) {
    ESPI_TRY(espi_ids_encode(&w->out->ids, w->tokenizer, w->text, w->n_text, false));
    w->n_text = 0;
    return ESP_OK;
}

static esp_status control(writer *w, const char *token) {
    const int32_t id = esp_tokenizer_id(w->tokenizer, token);
    if (id < 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "messages: the chat format of the model's family needs the token %s, which its tokenizer does not have; give "
                         "\"prompt\" and \"answer\", or token ids",
                         token);
    ESPI_TRY(flush(w));
    return espi_ids_add(&w->out->ids, id);
}

/* <|token|>text */
static esp_status section(writer *w, const char *token, span text) {
    ESPI_TRY(control(w, token));
    return put(w, text);
}

/* ---- reading messages ---- */

static esp_status read_text(span *out, const json_t *message, const char *key, size_t i, bool required) {
    const json_t *value = json_object_get(message, key);
    *out = (span){NULL, 0};
    if (!required && (!value || json_is_null(value))) return ESP_OK;
    if (!json_is_string(value))
        return ESPI_FAIL(ESP_ERR_FORMAT, "messages[%zu]: key \"%s\": got %s, expected a string", i, key,
                         value ? "another type" : "nothing");
    *out = (span){json_string_value(value), json_string_length(value)};
    return ESP_OK;
}

static bool is(span s, const char *text) {
    return s.n == strlen(text) && memcmp(s.p, text, s.n) == 0;
}

/* Role and content of message i of the conversation. */
static esp_status message(span *role, span *content, const conversation *c, size_t i) {
    if (i + 1 == c->n && c->given.p) {
        *role = whole("assistant");
        *content = c->given;
        return ESP_OK;
    }
    const json_t *m = json_array_get(c->messages, i), *calls = json_object_get(m, "tool_calls");
    if (calls && !json_is_null(calls) && json_array_size(calls) > 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "messages[%zu]: got tool_calls, expected text contents only", i);
    ESPI_TRY(read_text(role, m, "role", i, true));
    return read_text(content, m, "content", i, true);
}

static esp_status unknown_role(span role, size_t i, const char *expected) {
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "messages[%zu]: role: got %.*s, expected %s", i, (int)role.n, role.p, expected);
}

/* The rest of the conversation belongs to the answer. */
static esp_status cut(writer *w) {
    ESPI_TRY(flush(w));
    w->out->n_prompt = (int32_t)w->out->ids.n;
    return ESP_OK;
}

/* ---- ChatML ---- */

static span strip(span s, bool left, bool right) {
    while (left && s.n > 0 && s.p[0] == '\n') s.p++, s.n--;
    while (right && s.n > 0 && s.p[s.n - 1] == '\n') s.n--;
    return s;
}

/* First or last place of `what` in s; NULL: nowhere. */
static const char *find(span s, const char *what, bool last) {
    const size_t n = strlen(what);
    const char *found = NULL;
    for (size_t i = 0; i + n <= s.n && (last || !found); i++)
        if (memcmp(s.p + i, what, n) == 0) found = s.p + i;
    return found;
}

static bool is_tool_response(span s) {
    static const char begin[] = "<tool_response>", end[] = "</tool_response>";
    const size_t b = sizeof begin - 1, e = sizeof end - 1;
    return s.n >= b && s.n >= e && memcmp(s.p, begin, b) == 0 && memcmp(s.p + s.n - e, end, e) == 0;
}

/* The last question of the user's: thoughts of the assistant before it are forgotten. */
static esp_status last_query(size_t *query, const conversation *c) {
    *query = c->n - 1;
    for (size_t i = c->n; i-- > 0;) {
        span role, content;
        ESPI_TRY(message(&role, &content, c, i));
        if (!is(role, "user") || is_tool_response(content)) continue;
        *query = i;
        break;
    }
    return ESP_OK;
}

/* What the assistant thought, and what it said. */
static esp_status thoughts(span *thought, span *content, const conversation *c, size_t i) {
    *thought = (span){"", 0};
    if (!(i + 1 == c->n && c->given.p)) {
        span stated;
        ESPI_TRY(read_text(&stated, json_array_get(c->messages, i), "reasoning_content", i, false));
        if (stated.p) {
            *thought = stated;
            return ESP_OK;
        }
    }
    const char *first = find(*content, "</think>", false), *last = find(*content, "</think>", true);
    if (!first) return ESP_OK;
    span before = strip((span){content->p, (size_t)(first - content->p)}, false, true);
    const char *open = find(before, "<think>", true);
    if (open) before = (span){open + strlen("<think>"), before.n - (size_t)(open + strlen("<think>") - before.p)};
    *thought = strip(before, true, false);
    last += strlen("</think>");
    *content = strip((span){last, content->n - (size_t)(last - content->p)}, true, false);
    return ESP_OK;
}

static esp_status think_block(writer *w, span thought) {
    ESPI_TRY(section(w, "<think>", whole("\n")));
    ESPI_TRY(put(w, strip(thought, true, true)));
    ESPI_TRY(put(w, whole("\n")));
    return section(w, "</think>", whole("\n\n"));
}

static esp_status chatml_assistant(writer *w, const conversation *c, size_t i, size_t query, span content) {
    const bool last = i + 1 == c->n;
    span thought;
    ESPI_TRY(thoughts(&thought, &content, c, i));
    ESPI_TRY(section(w, "<|im_start|>", whole("assistant\n")));
    if (last && c->options.no_thinking && strip(thought, true, true).n > 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "messages[%zu]: got an answer with thoughts and no_thinking, expected one of them", i);
    if (last && !c->options.no_thinking) ESPI_TRY(cut(w));
    const bool thinks = i > query && (last || thought.n > 0);
    if (thinks) ESPI_TRY(think_block(w, thought));
    if (last && c->options.no_thinking) ESPI_TRY(cut(w));
    ESPI_TRY(put(w, strip(content, thinks, false)));
    ESPI_TRY(control(w, "<|im_end|>"));
    return last ? ESP_OK : put(w, whole("\n")); /* an answer ends with its end token */
}

/* Neighbouring answers of tools are one turn of the user's. */
static esp_status chatml_tool(writer *w, const conversation *c, size_t i, span content) {
    span before = {"", 0}, behind = {"", 0}, ignored;
    if (i > 0) ESPI_TRY(message(&before, &ignored, c, i - 1));
    if (i + 1 < c->n) ESPI_TRY(message(&behind, &ignored, c, i + 1));
    if (!is(before, "tool")) ESPI_TRY(section(w, "<|im_start|>", whole("user")));
    ESPI_TRY(put(w, whole("\n")));
    ESPI_TRY(section(w, "<tool_response>", whole("\n")));
    ESPI_TRY(put(w, content));
    ESPI_TRY(put(w, whole("\n")));
    ESPI_TRY(control(w, "</tool_response>"));
    return is(behind, "tool") ? ESP_OK : section(w, "<|im_end|>", whole("\n"));
}

static esp_status chatml(writer *w, const conversation *c) {
    size_t query;
    ESPI_TRY(last_query(&query, c));
    for (size_t i = 0; i < c->n; i++) {
        span role, content;
        ESPI_TRY(message(&role, &content, c, i));
        if (is(role, "assistant")) {
            ESPI_TRY(chatml_assistant(w, c, i, query, content));
        } else if (is(role, "tool")) {
            ESPI_TRY(chatml_tool(w, c, i, content));
        } else if (is(role, "user") || is(role, "system")) {
            ESPI_TRY(section(w, "<|im_start|>", role));
            ESPI_TRY(put(w, whole("\n")));
            ESPI_TRY(put(w, content));
            ESPI_TRY(section(w, "<|im_end|>", whole("\n")));
        } else {
            return unknown_role(role, i, "system, user, assistant or tool");
        }
    }
    if (c->answered) return ESP_OK;
    ESPI_TRY(section(w, "<|im_start|>", whole("assistant\n")));
    return c->options.no_thinking ? think_block(w, (span){"", 0}) : ESP_OK;
}

/* ---- harmony ---- */

/* The line of today's date, which the template has, is left out: a run gives the same tokens on any day. */
#define HARMONY_SYSTEM                                                                                                                     \
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\nReasoning: medium\n\n"                       \
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."

static esp_status turn(writer *w, span role, span content) {
    ESPI_TRY(section(w, "<|start|>", role));
    ESPI_TRY(section(w, "<|message|>", content));
    return control(w, "<|end|>");
}

static esp_status harmony_assistant(writer *w, const conversation *c, size_t i, span content) {
    const bool answer = i + 1 == c->n;
    ESPI_TRY(section(w, "<|start|>", whole("assistant")));
    if (answer) {
        span thought = {NULL, 0};
        ESPI_TRY(cut(w));
        if (!c->given.p) ESPI_TRY(read_text(&thought, json_array_get(c->messages, i), "thinking", i, false));
        if (thought.p) { /* thoughts of earlier turns are dropped */
            ESPI_TRY(section(w, "<|channel|>", whole("analysis")));
            ESPI_TRY(section(w, "<|message|>", thought));
            ESPI_TRY(control(w, "<|end|>"));
            ESPI_TRY(section(w, "<|start|>", whole("assistant")));
        }
    }
    ESPI_TRY(section(w, "<|channel|>", whole("final")));
    ESPI_TRY(section(w, "<|message|>", content));
    return control(w, answer ? "<|return|>" : "<|end|>");
}

static esp_status harmony(writer *w, const conversation *c) {
    ESPI_TRY(turn(w, whole("system"), whole(HARMONY_SYSTEM)));
    for (size_t i = 0; i < c->n; i++) {
        span role, content;
        ESPI_TRY(message(&role, &content, c, i));
        if (i == 0 && (is(role, "system") || is(role, "developer"))) {
            if (content.n == 0) continue;
            ESPI_TRY(section(w, "<|start|>", whole("developer")));
            ESPI_TRY(section(w, "<|message|>", whole("# Instructions\n\n")));
            ESPI_TRY(put(w, content));
            ESPI_TRY(put(w, whole("\n\n")));
            ESPI_TRY(control(w, "<|end|>"));
        } else if (is(role, "assistant")) {
            ESPI_TRY(harmony_assistant(w, c, i, content));
        } else if (is(role, "user")) {
            ESPI_TRY(turn(w, role, content));
        } else {
            return unknown_role(role, i, "user or assistant, or system or developer as the first");
        }
    }
    return c->answered ? ESP_OK : section(w, "<|start|>", whole("assistant"));
}

/* ---- */

/* Who answers: the caller's text, or the last message. */
static esp_status settle(conversation *c, const char *answer) {
    const size_t n = json_array_size(c->messages);
    for (size_t i = 0; i < n; i++)
        if (!json_is_object(json_array_get(c->messages, i)))
            return ESPI_FAIL(ESP_ERR_FORMAT, "messages[%zu]: got no object, expected one", i);
    if (n == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "messages: got no list of messages or an empty one, expected at least one");
    c->n = n + (answer ? 1 : 0);
    if (answer) c->given = whole(answer);
    span role, content;
    ESPI_TRY(message(&role, &content, c, c->n - 1));
    c->answered = is(role, "assistant");
    if (c->answered && c->n == 1) return ESPI_FAIL(ESP_ERR_FORMAT, "messages: got an answer alone, expected a question before it");
    return ESP_OK;
}

static esp_status keep_answer(espi_chat_ids *out, const conversation *c) {
    span role, content;
    if (!c->answered) return ESP_OK;
    ESPI_TRY(message(&role, &content, c, c->n - 1));
    out->answer = malloc(content.n + 1);
    if (!out->answer) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for an answer of %zu bytes", content.n);
    memcpy(out->answer, content.p, content.n);
    out->answer[content.n] = 0;
    return ESP_OK;
}

static esp_status write_all(writer *w, const conversation *c) {
    ESPI_TRY(c->options.format == ESPI_CHAT_CHATML ? chatml(w, c) : harmony(w, c));
    ESPI_TRY(flush(w));
    if (!c->answered) w->out->n_prompt = (int32_t)w->out->ids.n;
    return keep_answer(w->out, c);
}

esp_status espi_chat_encode(espi_chat_ids *out, const json_t *messages, const char *answer, const esp_tokenizer *tokenizer,
                            const espi_chat_options *options) {
    *out = (espi_chat_ids){0};
    if (options->format == ESPI_CHAT_NONE)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "messages: the model's family states no chat format, expected \"prompt\" and \"answer\", or "
                                              "token ids");
    conversation c = {.messages = messages, .options = *options};
    writer w = {.tokenizer = tokenizer, .out = out};
    ESPI_TRY(settle(&c, answer));
    const esp_status status = write_all(&w, &c);
    free(w.text);
    if (status != ESP_OK) espi_chat_free(out);
    return status;
}

void espi_chat_free(espi_chat_ids *chat) {
    free(chat->ids.p);
    free(chat->answer);
    *chat = (espi_chat_ids){0};
}
