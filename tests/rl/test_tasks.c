/* Task files, the built-in rewards, and the text of completions. */
#include "demo.h"

static espi_tasks_options options(const esp_tokenizer *tokenizer, bool scored) {
    return (espi_tasks_options){.tokenizer = tokenizer, .eos = 2, .vocab = 64, .scored = scored, .chat = {ESPI_CHAT_CHATML, false}};
}

static esp_status read_lines(espi_tasks *tasks, const char *content, bool scored) {
    char path[256];
    esp_tokenizer *tokenizer;
    demo_folder(path, "tasks.jsonl");
    OK(esp_tokenizer_load(&tokenizer, DEMO_MODEL));
    OK(espi_file_write_atomic(path, content, strlen(content)));
    const espi_tasks_options o = options(tokenizer, scored);
    const esp_status status = espi_tasks_read(tasks, path, &o);
    esp_tokenizer_destroy(tokenizer);
    remove(path);
    return status;
}

static void bad_for(bool scored, esp_status status, const char *content, const char *words) {
    espi_tasks tasks;
    FAILS(status, words, read_lines(&tasks, content, scored));
    cr_assert_null(tasks.items);
}

static void bad(const char *content, const char *words) {
    bad_for(false, ESP_ERR_FORMAT, content, words);
}

#define GOOD "{\"prompt\":\"sab=\",\"answer\":\"ab\"}\n"

Test(tasks, ids_of_the_bundled_file) {
    esp_tokenizer *tokenizer;
    espi_tasks tasks;
    OK(esp_tokenizer_load(&tokenizer, DEMO_MODEL));
    const espi_tasks_options o = options(tokenizer, true);
    OK(espi_tasks_read(&tasks, DEMO_EVAL, &o));
    const int32_t prompt[] = {1, 42, 27, 28, 26, 25, 26, 5}, answer[] = {25, 26, 26, 27, 28, 2};
    cr_assert_eq(tasks.n, 256);
    cr_assert_str_eq(tasks.items[0].prompt, "sdecbc=");
    cr_assert_eq(tasks.items[0].n_prompt, 8);
    cr_assert_eq(memcmp(tasks.items[0].prompt_ids, prompt, sizeof prompt), 0);
    cr_assert_eq(tasks.items[0].n_answer, 6);
    cr_assert_eq(memcmp(tasks.items[0].answer_ids, answer, sizeof answer), 0);
    cr_assert_eq(tasks.longest_prompt, 10);
    cr_assert_eq(tasks.longest_line, 18);
    espi_tasks_free(&tasks);
    esp_tokenizer_destroy(tokenizer);
}

/* Every form of line that says "sab=" -> "ab", and what is trained on of it. */
Test(tasks, forms_of_a_line) {
    static const struct {
        const char *line;
        int n_prompt, n_answer, n_counted;
        bool scored;
    } cases[] = {{GOOD, 5, 3, 3, true},
                 {"{\"prompt_ids\":[1,42,24,25,5],\"answer_ids\":[24,25,2]}\n", 5, 3, 3, true},
                 {"{\"prompt_ids\":[1,42,24,25,5],\"answer\":\"ab\"}\n", 5, 3, 3, true},
                 {"{\"ids\":[1,42,24,25,5,24,25,2],\"mask\":[0,0,0,0,0,1,1,1]}\n", 5, 3, 3, false},
                 {"{\"ids\":[1,42,24,25,5,24,25,2],\"mask\":[0,0,1,0,0,1,1,1]}\n", 2, 6, 4, false},
                 {"{\"text\":\"sab=ab\"}\n", 1, 7, 7, false}};
    static const int32_t row[] = {1, 42, 24, 25, 5, 24, 25, 2};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int scored = 0; scored <= cases[i].scored; scored++) {
            espi_tasks tasks;
            OK(read_lines(&tasks, cases[i].line, scored));
            const espi_task *task = tasks.items;
            cr_assert_eq(tasks.n, 1);
            cr_assert(task->n_prompt == cases[i].n_prompt && task->n_answer == cases[i].n_answer && task->n_counted == cases[i].n_counted,
                      "case %zu: %d, %d, %d", i, task->n_prompt, task->n_answer, task->n_counted);
            cr_assert_eq(memcmp(task->prompt_ids, row, sizeof row), 0, "case %zu", i);
            cr_assert_eq(task->answer_ids, task->prompt_ids + task->n_prompt);
            cr_assert_eq(task->answer_mask != NULL, strstr(cases[i].line, "mask") != NULL);
            for (int k = 0; task->answer_mask && task->n_answer == 6 && k < 6; k++) cr_assert_eq(task->answer_mask[k], k == 0 || k > 2);
            if (scored) cr_assert_str_eq(task->answer, "ab");
            if (scored) cr_assert_str_eq(task->prompt, i == 0 ? "sab=" : "<bos>sab=");
            espi_tasks_free(&tasks);
        }
}

Test(tasks, errors_name_file_and_line) {
    bad(GOOD GOOD "{\"prompt\":", "tasks.jsonl:3: not JSON");
    bad(GOOD "{\"prompt\":\"\\ud800\",\"answer\":\"a\"}\n", "tasks.jsonl:2: not JSON"); /* half of a surrogate pair */
    bad(GOOD "\n{\"prompt\":\"a\"}\n", "tasks.jsonl:3: key \"answer\": got nothing");
    bad("{\"prompt\":7,\"answer\":\"a\"}\n", "tasks.jsonl:1: key \"prompt\": got another type");
    bad("[1]\n", "tasks.jsonl:1: got another JSON value");
    bad("{\"question\":\"a\"}\n", "tasks.jsonl:1: got none of the keys");
    bad("{\"prompt\":\"a\",\"text\":\"a\"}\n", "tasks.jsonl:1: got the keys \"prompt\" and \"text\"");
    bad("{\"prompt_ids\":[1,64],\"answer_ids\":[2]}\n", "item 1: got 64, expected 0 to 63");
    bad("{\"prompt_ids\":[1,-1],\"answer_ids\":[2]}\n", "item 1: got -1");
    bad("{\"prompt_ids\":[1,\"a\"],\"answer_ids\":[2]}\n", "item 1: got no integer");
    bad("{\"prompt_ids\":[],\"answer_ids\":[2]}\n", "the prompt has no token");
    bad("{\"prompt_ids\":[1],\"answer_ids\":[]}\n", "the answer has no token");
    bad("{\"prompt_ids\":[1]}\n", "key \"answer_ids\": got nothing");
    bad("{\"ids\":[1,2],\"mask\":[0]}\n", "key \"mask\": got 1 items, expected 2");
    bad("{\"ids\":[1,2,3],\"mask\":[0,1]}\n", "key \"mask\": got 2 items, expected 3"); /* nothing behind the mask is read: for ASan */
    bad("{\"ids\":[1,2],\"mask\":[1,1]}\n", "nothing stands before it");
    bad("{\"ids\":[1,2],\"mask\":[0,0]}\n", "the answer has no token");
    bad("{\"ids\":[1,2],\"mask\":[0,2]}\n", "item 1: got 2, expected 0 to 1");
    bad("\n \n", "no line");
    bad_for(true, ESP_ERR_FORMAT, "{\"text\":\"a\"}\n", "tasks.jsonl:1: key \"text\"");
    bad_for(true, ESP_ERR_UNSUPPORTED, "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"answer\":\"b\"}\n",
            "tasks.jsonl:1: messages: the chat format of the model's family needs the token <|im_start|>");
}

Test(rewards, exact_and_match) {
    const struct {
        const char *completion, *answer;
        uint8_t stopped;
        float exact, match;
    } cases[] = {{"bccde", "bccde", 1, 1, 1},
                 {"bccde", "bccde", 0, 0, 1},
                 {"bcc", "bccde", 1, 0, 0.6f},
                 {"", "ab", 1, 0, 0},
                 {"abab", "ab", 1, 0, 1},
                 {"ba", "ab", 1, 0, 0},
                 {"", "", 1, 1, 1},
                 {"a", "", 1, 0, 0},
                 {"\xC3\xA9x", "\xC3\xA9y", 1, 0, 0.5f},
                 {"<bos>ab", "ab", 1, 0, 0.5f}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        float reward;
        const esp_reward_batch batch = {.struct_size = sizeof batch,
                                        .n = 1,
                                        .group_size = 1,
                                        .completion = &cases[i].completion,
                                        .answer = &cases[i].answer,
                                        .stopped = &cases[i].stopped};
        cr_assert_eq(esp_reward_exact(NULL, &batch, &reward), 0);
        cr_assert_eq(reward, cases[i].exact, "case %zu: exact %g", i, (double)reward);
        cr_assert_eq(esp_reward_match(NULL, &batch, &reward), 0);
        cr_assert_eq(reward, cases[i].match, "case %zu: match %g", i, (double)reward);
    }
}

Test(rewards, text_of_a_completion) {
    esp_tokenizer *tokenizer;
    char *text;
    const int32_t ids[] = {24, 1, 25, 60, 2};
    OK(esp_tokenizer_load(&tokenizer, DEMO_MODEL));
    OK(espi_completion_text(&text, tokenizer, ids, 5, true));
    cr_assert_str_eq(text, "a<bos>b\xEF\xBF\xBD");
    free(text);
    OK(espi_completion_text(&text, tokenizer, ids + 4, 1, true));
    cr_assert_str_eq(text, "");
    free(text);
    esp_tokenizer_destroy(tokenizer);
}
