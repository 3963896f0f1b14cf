/* Rewards: descriptions, the built-in kinds, several at once, deadlines, shared objects. */
#include "rewards.h"

#include "core/clock.h"

#include <stdatomic.h>
#include <time.h>

/* What a described reward gives one completion. */
static float one(const char *description, const char *completion, const char *answer) {
    static texts t;
    float reward = -77;
    esp_reward r;
    memset(&t, 0, sizeof t);
    add(&t, completion, answer);
    t.batch.max_completion = 20;
    OK(esp_reward_open(&r, description));
    cr_assert_eq(r.fn(r.user, &t.batch, &reward), 0);
    esp_reward_close(&r);
    return reward;
}

static void gives(float expected, const char *description, const char *completion, const char *answer) {
    const float got = one(description, completion, answer);
    const bool same = isnan(expected) ? isnan(got) : fabsf(got - expected) <= 1e-6f;
    cr_expect(same, "%s on \"%s\" (answer \"%s\"): got %g, expected %g", description, completion, answer, (double)got, (double)expected);
}

Test(reward, descriptions) {
    esp_reward r;
    OK(esp_reward_open(&r, "exact"));
    cr_expect_str_eq(r.name, "exact");
    cr_expect_eq(r.weight, 1);
    esp_reward_close(&r);
    cr_expect_null(r.fn);
    OK(esp_reward_open(&r, "-0.25*length(target=5,name=short,width=2)"));
    cr_expect_str_eq(r.name, "short");
    cr_expect_eq(r.weight, -0.25);
    esp_reward_close(&r);
    OK(esp_reward_open(&r, "regex(name=a-b):a(b):c,d=e"));
    cr_expect_str_eq(r.name, "a-b");
    esp_reward_close(&r);
    esp_reward_close(&r);
    esp_reward_close(NULL);
    FAILS(ESP_ERR_ARG, "expected one of exact, match, partial, regex", esp_reward_open(&r, "exakt"));
    FAILS(ESP_ERR_ARG, "expected one of exact", esp_reward_open(&r, ""));
    FAILS(ESP_ERR_ARG, "expected a : and a pattern", esp_reward_open(&r, "regex"));
    FAILS(ESP_ERR_ARG, "expected a : and a command", esp_reward_open(&r, "cmd:"));
    FAILS(ESP_ERR_ARG, "behind the :, expected neither", esp_reward_open(&r, "exact:x"));
    FAILS(ESP_ERR_ARG, "have no end", esp_reward_open(&r, "length(target=5"));
    FAILS(ESP_ERR_ARG, "behind the )", esp_reward_open(&r, "length(target=5)x"));
    FAILS(ESP_ERR_ARG, "keys of name, target, width", esp_reward_open(&r, "length(goal=5)"));
    FAILS(ESP_ERR_ARG, "keys of name, target, width", esp_reward_open(&r, "length(target)"));
    FAILS(ESP_ERR_ARG, "whole number from 1", esp_reward_open(&r, "length(target=5.5)"));
    FAILS(ESP_ERR_ARG, "got \"5x\"", esp_reward_open(&r, "length(target=5x)"));
    FAILS(ESP_ERR_ARG, "got no target", esp_reward_open(&r, "length"));
    FAILS(ESP_ERR_ARG, "got no buffer", esp_reward_open(&r, "overlong"));
    FAILS(ESP_ERR_ARG, "below buffer", esp_reward_open(&r, "overlong(max=4,buffer=5)"));
    FAILS(ESP_ERR_ARG, "keys of name", esp_reward_open(&r, "exact(x=1)"));
    FAILS(ESP_ERR_ARG, "got a name of 0 bytes", esp_reward_open(&r, "exact(name=)"));
    FAILS(ESP_ERR_ARG, "no spaces", esp_reward_open(&r, "exact(name=a b)"));
    FAILS(ESP_ERR_ARG, "got weight inf", esp_reward_open(&r, "inf*exact"));
    FAILS(ESP_ERR_ARG, "at byte 4", esp_reward_open(&r, "regex:a(bc"));
    FAILS(ESP_ERR_ARG, "expected an object", esp_reward_open(&r, "json:[]"));
    FAILS(ESP_ERR_ARG, "one of string, number", esp_reward_open(&r, "json:{\"a\":\"text\"}"));
    FAILS(ESP_ERR_ARG, "children", esp_reward_open(&r, "cmd(children=0):x"));
    FAILS(ESP_ERR_ARG, "NULL", esp_reward_open(&r, NULL));
}

Test(reward, exact_and_match) {
    gives(1, "exact", "cab", "cab");
    gives(0, "exact", "cab ", "cab");
    gives(0.5f, "match", "xb", "ab");
    gives(0.5f, "partial", "\xC3\xA9x", "\xC3\xA9\xC3\xA8");
}

Test(reward, regex) {
    gives(1, "regex:^<b>.*</b>$", "<b>x</b>", "");
    gives(0, "regex:^<b>.*</b>$", " <b>x</b>", "");
    gives(1, "regex:answer (?<answer>\\w+)", "the answer cab.", "cab");
    gives(0, "regex:answer (?<answer>\\w+)", "the answer cat.", "cab");
    gives(0, "regex:answer(?<answer> \\w+)?", "the answer", "");
    gives(1, "regex:^\xC3\xA9.$", "\xC3\xA9\xC3\xA8", "");
    gives(NAN, "regex:^(a+)+$", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "");
}

Test(reward, number) {
    gives(1, "number", "So the answer is 42.", "42");
    gives(1, "number", "The Answer Is: $1,234.50!", "#### 1234.5");
    gives(1, "number", "answer is 3, no: the answer is -7", "-7");
    gives(0, "number", "answer is -7, no: the answer is 3", "-7");
    gives(1, "number", "answer is \\boxed{.5}", "0.5");
    gives(1, "number", "#### 1e3", "1000");
    gives(0, "number", "42", "42");
    gives(1, "number(anywhere=1)", "first 7, then 42 of them", "42");
    gives(0, "number(anywhere=1)", "none at all", "42");
    gives(NAN, "number", "answer is 1", "one");
    gives(1, "number(tolerance=0.01)", "answer is 3.14", "3.1416");
    gives(0, "number(tolerance=0.001)", "answer is 3.14", "3.1416");
    gives(0, "number", "answer is 1,23", "123");
    gives(0, "number", "answer is inf", "1");
}

Test(reward, json_shape) {
    static const char shape[] = "json:{\"name\":\"string\",\"age\":\"integer\",\"tags?\":\"array\"}";
    gives(1, shape, "{\"name\":\"x\",\"age\":3}", "");
    gives(1, shape, "Here:\n```json\n{\"name\":\"x\",\"age\":3,\"tags\":[]}\n```\nDone.", "");
    gives(0.75f, shape, "{\"name\":\"x\",\"age\":3.5}", "");
    gives(0.75f, shape, "{\"name\":\"x\",\"age\":3,\"tags\":1}", "");
    gives(0.5f, shape, "{}", "");
    gives(0, shape, "[1]", "");
    gives(0, shape, "{\"name\":", "");
}

Test(reward, json_types) {
    static const char *const values[] = {"\"x\"", "1", "1.5", "true", "false", "[]", "{}", "null"};
    static const struct {
        const char *type, *fits; /* '1' at the place of a value that does */
    } types[] = {{"string", "10000000"}, {"number", "01100000"}, {"integer", "01000000"}, {"boolean", "00011000"},
                 {"array", "00000100"},  {"object", "00000010"}, {"null", "00000001"},    {"any", "11111111"}};
    for (int i = 0; i < ESPI_COUNT(types); i++)
        for (int k = 0; k < ESPI_COUNT(values); k++) {
            char description[64], completion[64];
            snprintf(description, sizeof description, "json:{\"key\":\"%s\"}", types[i].type);
            snprintf(completion, sizeof completion, "{\"key\":%s}", values[k]);
            gives(types[i].fits[k] == '1' ? 1 : 0.5f, description, completion, "");
        }
}

Test(reward, length_repetition_overlong) {
    gives(1, "length(target=5)", "abcde", "");
    gives(0.6f, "length(target=5)", "abc", "");
    gives(0, "length(target=5,width=2)", "abc", "");
    gives(0, "repetition", "abcdef", "");
    gives(-0.6f, "repetition(n=2)", "ababab", ""); /* ab ba ab ba ab: three of five were there before */
    gives(-1.2f, "repetition(n=2,max=2)", "ababab", "");
    gives(0, "repetition", "ab", "");
    gives(0, "overlong(buffer=5)", "aaaaaaaaaaaaaaa", "");
    gives(-0.4f, "overlong(buffer=5)", "aaaaaaaaaaaaaaaaa", "");
    gives(-1, "overlong(buffer=5)", "aaaaaaaaaaaaaaaaaaaa", "");
    gives(-1, "overlong(max=10,buffer=5)", "aaaaaaaaaaaaaaa", "");
}

static int lengths(void *user, const esp_reward_batch *b, float *reward) {
    (void)user;
    for (int64_t i = 0; i < b->n; i += 2) { /* the others are left alone: not scorable */
        reward[i] = (float)b->completion_length[i];
        esp_reward_log(b, "length", b->completion_length[i]);
    }
    esp_reward_log(b, "mean", 1);
    esp_reward_log(b, "nan", NAN);
    return 0;
}

static int refusing(void *user, const esp_reward_batch *b, float *reward) {
    (void)user, (void)reward;
    return esp_reward_fail(b, "the moon is full");
}

Test(reward, several_at_once_and_their_scalars) {
    static texts t;
    add(&t, "cab", "cab");
    add(&t, "ca", "cab");
    add(&t, "a", "cab");
    const esp_reward list[] = {{.name = "exact", .fn = esp_reward_exact, .weight = 1}, {.name = "own", .fn = lengths, .weight = 2}};
    espi_rewards *set;
    double parts[6];
    OK(espi_rewards_create(&set, list, 2, 0));
    for (int round = 0; round < 2; round++) OK(espi_rewards_score(parts, set, &t.batch));
    cr_expect(parts[0] == 1 && parts[2] == 0 && parts[4] == 0);
    cr_expect(parts[1] == 3 && isnan(parts[3]) && parts[5] == 1);
    cr_expect_eq(espi_rewards_extra_count(set), 1);
    cr_expect_eq(extra(set, "own/length"), 2, "the mean of 3 and 1, twice");
    espi_rewards_reset(set);
    cr_expect_eq(espi_rewards_extra_count(set), 0);
    espi_rewards_destroy(set);
}

Test(reward, lists_that_make_no_sense) {
    espi_rewards *set;
    esp_reward list[] = {{.name = "a", .fn = lengths, .weight = 1}, {.name = "a", .fn = lengths, .weight = 1}};
    FAILS(ESP_ERR_ARG, "both called \"a\"", espi_rewards_create(&set, list, 2, 0));
    FAILS(ESP_ERR_ARG, "n_rewards", espi_rewards_create(&set, list, 0, 0));
    FAILS(ESP_ERR_ARG, "deadline", espi_rewards_create(&set, list, 1, NAN));
    list[0].weight = NAN;
    FAILS(ESP_ERR_ARG, "weight", espi_rewards_create(&set, list, 1, 0));
    list[0].fn = NULL;
    FAILS(ESP_ERR_ARG, "name or fn is NULL", espi_rewards_create(&set, list, 1, 0));
    const esp_reward refuses = {.name = "no", .fn = refusing, .weight = 1};
    static texts t;
    double part;
    add(&t, "x", "y");
    for (int aside = 0; aside < 2; aside++) {
        OK(espi_rewards_create(&set, &refuses, 1, aside ? 10 : 0));
        FAILS(ESP_ERR_CALLBACK, "\"no\" failed at step 7: the moon is full", espi_rewards_score(&part, set, &t.batch));
        espi_rewards_destroy(set);
    }
}

/* Sleeps as long as it is told, then says what it found. */
typedef struct sleeper {
    atomic_int naps, calls, ended;
    atomic_int wrong; /* its batch changed under it */
} sleeper;

static int sleep_and_score(void *user, const esp_reward_batch *b, float *reward) {
    sleeper *s = user;
    s->calls++;
    for (int naps = s->naps; naps > 0; naps--) nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    for (int64_t i = 0; i < b->n; i++) {
        s->wrong += strcmp(b->completion[i], i ? "two" : "one") != 0 || strcmp(b->answer[i], "z") != 0;
        s->wrong += b->completion_ids[i][0] != (i ? 't' : 'o') || b->prompt_ids[i][0] != 5 || b->prompt_length[i] != 1;
        reward[i] = (float)i + 1;
    }
    esp_reward_log(b, "calls", s->calls);
    s->ended++;
    return 0;
}

Test(reward, a_function_that_overruns_the_deadline) {
    static texts t;
    static sleeper s = {.naps = 40}; /* 0.4 s */
    static const int32_t prompt[1] = {5}, length[2] = {1, 1};
    static const int32_t *prompts[2] = {prompt, prompt};
    char one[] = "one", two[] = "two";
    add(&t, one, "z");
    add(&t, two, "z");
    t.batch.prompt_ids = prompts;
    t.batch.prompt_length = length;
    const esp_reward list[] = {{.name = "slow", .fn = sleep_and_score, .user = &s, .weight = 1},
                               {.name = "after", .fn = lengths, .weight = 1},
                               {.name = "exact", .fn = esp_reward_exact, .weight = 1, .punctual = true}};
    espi_rewards *set;
    double parts[6];
    OK(espi_rewards_create(&set, list, 3, 0.05));
    const double start = espi_seconds();
    OK(espi_rewards_score(parts, set, &t.batch));
    const double took = espi_seconds() - start;
    cr_expect(took >= 0.05 && took < 0.25, "%g s", took);
    cr_expect(isnan(parts[0]) && isnan(parts[3]), "given up");
    cr_expect(isnan(parts[1]) && isnan(parts[4]), "no time was left for it");
    cr_expect(parts[2] == 0 && parts[5] == 0, "a punctual one is asked all the same");
    cr_expect_eq(extra(set, "slow/timeouts"), 2);
    cr_expect_eq(extra(set, "after/timeouts"), 2);
    OK(espi_rewards_score(parts, set, &t.batch));
    cr_expect(isnan(parts[0]));
    cr_expect_eq(s.calls, 1, "a function that still runs is not called again");
    memset(one, 'x', 3), memset(two, 'x', 3); /* the caller's texts are gone by now */
    while (!s.ended) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    cr_expect_eq(s.wrong, 0);
    memcpy(one, "one", 3), memcpy(two, "two", 3);
    s.naps = 0;
    espi_rewards_reset(set);
    OK(espi_rewards_score(parts, set, &t.batch));
    cr_expect(parts[0] == 1 && parts[3] == 2 && parts[1] == 3, "%g %g %g", parts[0], parts[3], parts[1]);
    cr_expect_eq(extra(set, "slow/calls"), 2);
    cr_expect(isnan(extra(set, "slow/timeouts")));
    s.naps = 20;
    OK(espi_rewards_score(parts, set, &t.batch));
    espi_rewards_destroy(set); /* while it runs */
    while (s.ended < 3) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    cr_expect_eq(s.wrong, 0);
}

static void plugin(const char *parameters, const char *variant, esp_status expected, const char *words) {
    char description[1024];
    esp_reward r;
    snprintf(description, sizeof description, "so%s:" ESP_PLUGINS "/plugin_%s.so", parameters, variant);
    FAILS(expected, words, esp_reward_open(&r, description));
}

Test(reward, shared_objects) {
    gives(6, "so:" ESP_PLUGINS "/plugin_good.so", "abc", "");
    gives(15, "so(name=mine,factor=5):" ESP_PLUGINS "/plugin_good.so", "abc", "");
    plugin("", "absent", ESP_ERR_IO, "plugin_absent.so");
    plugin("", "nameless", ESP_ERR_FORMAT, "no symbol esp_reward_plugin_v1");
    plugin("", "other", ESP_ERR_MISMATCH, "got reward ABI 99, expected 1");
    plugin("", "short", ESP_ERR_FORMAT, "struct_size 4");
    plugin("(factor=x)", "good", ESP_ERR_CALLBACK, "begin(\"factor=x\") returned 3");
    esp_reward r;
    espi_rewards *set;
    static texts t;
    double part;
    add(&t, "abc", "");
    OK(esp_reward_open(&r, "so(factor=0):" ESP_PLUGINS "/plugin_good.so"));
    OK(espi_rewards_create(&set, &r, 1, 5));
    OK(espi_rewards_score(&part, set, &t.batch));
    cr_expect_eq(extra(set, "so/rows"), 1);
    espi_rewards_destroy(set);
    esp_reward_close(&r);
}
