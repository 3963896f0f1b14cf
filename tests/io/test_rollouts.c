/* Rollouts in HDF5: what is saved comes back to the bit, other programs' files are read, and every fault is named with its place. */
#include "outcome.h"
#include "program.h"
#include "rl/rollout_file.h"
#include "scratch.h"

#include <hdf5.h>
#include <math.h>

enum { VOCAB = 1000, EXPERTS = 7, LAYERS = 3, TOP_K = 2, GROUP = 4, REWARDS = 2 };
static const char *const names[REWARDS] = {"exact", "format"};

/* What a batch has beside the necessary. */
typedef enum part { ROUTES_8 = 1, ROUTES_16 = 2, KEPT_IDS = 4, ADVANTAGES = 8 } part;

static uint32_t dice(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static void set_route(espi_rollouts *r, int64_t at, uint16_t id) {
    if (r->shape.route_bytes == 1)
        r->routes[at] = (uint8_t)id;
    else
        memcpy(r->routes + 2 * at, &id, 2);
}

/* Rows of random lengths; values that no rounding leaves alone. */
static espi_rollouts make(int64_t groups, unsigned parts, uint32_t seed) {
    espi_rollouts r;
    espi_rollouts_shape s = {.rows = groups * GROUP, .group_size = GROUP, .rewards = REWARDS, .filtered = (parts & KEPT_IDS) != 0};
    if (parts & (ROUTES_8 | ROUTES_16)) {
        s.layers = LAYERS;
        s.top_k = TOP_K;
        s.route_bytes = parts & ROUTES_16 ? 2 : 1;
    }
    int64_t lengths[256], prompts[256];
    for (int64_t i = 0; i < s.rows; i++) {
        prompts[i] = 1 + dice(&seed) % 5;
        lengths[i] = prompts[i] + 1 + dice(&seed) % 9;
        s.tokens += lengths[i];
        if (s.filtered) s.kept += 2 * (lengths[i] - prompts[i]);
    }
    OK(espi_rollouts_create(&r, &s));
    for (int64_t i = 0, t = 0, k = 0; i < s.rows; i++) {
        r.n_prompt[i] = (int32_t)prompts[i];
        r.group[i] = 900 - i / GROUP;
        r.version[i] = 3 + i % 2;
        r.finish[i] = (uint8_t)(i % 3);
        r.advantage[i] = (double)((float)dice(&seed) / 3e7f);
        for (int f = 0; f < REWARDS; f++) r.rewards[i * REWARDS + f] = dice(&seed) % 5 == 0 ? NAN : (double)((float)dice(&seed) / 3e7f);
        for (int64_t n = 0; n < lengths[i]; n++, t++) {
            const bool answer = n >= prompts[i];
            r.tokens[t] = (int32_t)(1 + dice(&seed) % (VOCAB - 2));
            r.loss_mask[t] = answer && dice(&seed) % 7 != 0;
            r.sampler_logprob[t] = !answer ? 0 : dice(&seed) % 9 == 0 ? NAN : -(float)dice(&seed) / 3e7f;
            for (int c = 0; c < LAYERS * TOP_K && s.route_bytes && n + 1 < lengths[i]; c++)
                set_route(&r, t * LAYERS * TOP_K + c, (uint16_t)(dice(&seed) % EXPERTS));
            if (s.filtered && answer) {
                r.kept_ids[k++] = r.tokens[t] - (int32_t)(n % 2);
                r.kept_ids[k++] = r.tokens[t] + 1 - (int32_t)(n % 2);
            }
            if (s.filtered) r.kept_offsets[t + 1] = k;
        }
        r.offsets[i + 1] = t;
    }
    r.has_advantages = (parts & ADVANTAGES) != 0;
    OK(espi_rollouts_check(&r, VOCAB, EXPERTS));
    return r;
}

static const espi_rollout_facts known = {.vocab_size = VOCAB,
                                         .adapter_version = 4,
                                         .top_k = 0,
                                         .seed = 5,
                                         .temperature = 0.75,
                                         .top_p = 1,
                                         .min_p = 0,
                                         .tokenizer_hash = "0123456789abcdef",
                                         .model_id = "mix-mo\xC3\xA9",
                                         .reward_names = (char[REWARDS][ESPI_ROLLOUT_TEXT]){"exact", "format"}};

static const espi_rollout_limits limits = {
    .vocab = VOCAB, .layers = LAYERS, .experts = EXPERTS, .top_k = TOP_K, .tokenizer_hash = "0123456789abcdef"};

static espi_rollout_request request(int64_t position, int32_t n, bool routes) {
    return (espi_rollout_request){.n_prompts = n, .samples = GROUP, .temperature = 0.75f, .position = position, .routes = routes};
}

/* The same bits in all that a source fills in. */
static void same(const espi_rollouts *a, const espi_rollouts *b) {
    const espi_rollouts_shape *s = &a->shape;
    const size_t rows = (size_t)s->rows, tokens = (size_t)s->tokens;
    cr_assert_eq(memcmp(s, &b->shape, sizeof *s), 0, "other shapes");
    cr_expect_arr_eq(a->offsets, b->offsets, (rows + 1) * sizeof *a->offsets);
    cr_expect_arr_eq(a->n_prompt, b->n_prompt, rows * sizeof *a->n_prompt);
    cr_expect_arr_eq(a->tokens, b->tokens, tokens * sizeof *a->tokens);
    cr_expect_arr_eq(a->loss_mask, b->loss_mask, tokens);
    cr_expect_arr_eq(a->sampler_logprob, b->sampler_logprob, tokens * sizeof *a->sampler_logprob);
    cr_expect_arr_eq(a->finish, b->finish, rows);
    cr_expect_arr_eq(a->group, b->group, rows * sizeof *a->group);
    cr_expect_arr_eq(a->version, b->version, rows * sizeof *a->version);
    if (a->has_advantages) {
        cr_expect_arr_eq(a->advantage, b->advantage, rows * sizeof *a->advantage);
        for (size_t i = 0; i < rows * REWARDS; i++) cr_expect(isnan(b->rewards[i]));
    } else {
        cr_expect_arr_eq(a->rewards, b->rewards, rows * REWARDS * sizeof *a->rewards);
    }
    cr_expect_eq(b->has_advantages, a->has_advantages);
    cr_expect_eq(b->has_rewards, !a->has_advantages);
    if (s->route_bytes) cr_expect_arr_eq(a->routes, b->routes, tokens * LAYERS * TOP_K * (size_t)s->route_bytes);
    if (!s->filtered) return;
    cr_expect_arr_eq(a->kept_offsets, b->kept_offsets, (tokens + 1) * sizeof *a->kept_offsets);
    cr_expect_arr_eq(a->kept_ids, b->kept_ids, (size_t)s->kept * sizeof *a->kept_ids);
}

static void round_trip(unsigned parts, bool texts) {
    static const int32_t cuts[] = {1, 4, 2};
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    espi_rollout_source source;
    espi_rollout_summary sum;
    espi_rollouts a = make(7, parts, parts + 1);
    const char *text[7 * GROUP];
    for (int i = 0; i < 7 * GROUP; i++) text[i] = i % 2 ? "h\xC3\xA9" : "";
    scratch_make(dir);
    OK(espi_path_join(path, dir, "r.h5"));
    OK(espi_rollouts_save(path, &a, texts ? text : NULL, texts ? text : NULL, &known));
    OK(espi_file_source(&source, &sum, path, &limits, names, REWARDS));
    cr_expect(source.own_prompts && !source.exact);
    cr_expect_eq(sum.groups, 7);
    cr_expect_eq(sum.group_size, GROUP);
    for (int64_t i = 0, at = 0; i < 3; at += cuts[i++]) {
        espi_rollouts part = make(7, parts, parts + 1), b = {0};
        const espi_rollout_request q = request(at, cuts[i], (parts & (ROUTES_8 | ROUTES_16)) != 0);
        int64_t groups[7];
        for (int32_t g = 0; g < cuts[i]; g++) groups[g] = at + g;
        OK(espi_rollouts_select(&part, groups, cuts[i]));
        OK(source.generate(source.self, &b, &q));
        OK(espi_rollouts_check(&b, VOCAB, EXPERTS));
        same(&part, &b);
        espi_rollouts_free(&part);
        espi_rollouts_free(&b);
    }
    source.close(source.self);
    espi_rollouts_free(&a);
    scratch_remove(dir);
}

Test(rollouts, what_is_saved_comes_back_to_the_bit) {
    round_trip(0, false);
    round_trip(0, true);
    round_trip(ROUTES_8 | KEPT_IDS, true);
    round_trip(ROUTES_16, false);
    round_trip(ADVANTAGES | KEPT_IDS, false);
}

/* ---- other programs ---- */

static void plain_set(hid_t file, const char *name, hid_t stored, hid_t memory, int rank, const hsize_t *dims, const void *data) {
    const hid_t space = H5Screate_simple(rank, dims, NULL);
    const hid_t set = H5Dcreate2(file, name, stored, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    cr_assert(set >= 0 && H5Dwrite(set, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, data) >= 0, "%s", name);
    H5Dclose(set);
    H5Sclose(space);
}

static void plain_attribute(hid_t file, const char *name, hid_t type, const void *value) {
    const hid_t space = H5Screate(H5S_SCALAR), attribute = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    cr_assert(attribute >= 0 && H5Awrite(attribute, type, value) >= 0, "%s", name);
    H5Aclose(attribute);
    H5Sclose(space);
}

/* The least that another program has to write, big-endian, with texts of fixed length.  version: of the schema. */
static void plain_file(const char *path, int version, bool wide_tokens) {
    static const int32_t tokens[7] = {5, 6, 7, 5, 6, 8, 9}, prompts[2] = {2, 2};
    static const int64_t offsets[3] = {0, 3, 7}, groups[2] = {4, 4};
    static const float advantage[2] = {-0.5f, 0.5f};
    static const char id[12] = "other/model";
    const hsize_t two = 2, three = 3, seven = 7;
    const hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT), text = H5Tcopy(H5T_C_S1);
    H5Tset_size(text, sizeof id);
    plain_set(file, "tokens", wide_tokens ? H5T_STD_I64BE : H5T_STD_I32BE, H5T_NATIVE_INT32, 1, &seven, tokens);
    plain_set(file, "seq_offsets", H5T_STD_I64BE, H5T_NATIVE_INT64, 1, &three, offsets);
    plain_set(file, "prompt_len", H5T_STD_I32LE, H5T_NATIVE_INT32, 1, &two, prompts);
    plain_set(file, "group_id", H5T_STD_I64LE, H5T_NATIVE_INT64, 1, &two, groups);
    plain_set(file, "advantage", H5T_IEEE_F32BE, H5T_NATIVE_FLOAT, 1, &two, advantage);
    plain_attribute(file, "version", H5T_NATIVE_INT, &version);
    plain_attribute(file, "model_id", text, id);
    H5Tclose(text);
    H5Fclose(file);
}

Test(rollouts, the_least_that_another_program_writes) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], told[256];
    espi_rollout_source source;
    espi_rollout_summary sum;
    espi_rollouts r = {0};
    scratch_make(dir);
    OK(espi_path_join(path, dir, "r.h5"));
    plain_file(path, 1, false);
    OK(espi_file_source(&source, &sum, path, &limits, names, REWARDS));
    const espi_rollout_request q = {.n_prompts = 1, .samples = 2, .temperature = 1};
    OK(source.generate(source.self, &r, &q));
    OK(espi_rollouts_check(&r, VOCAB, EXPERTS));
    cr_expect(r.has_advantages && !r.has_rewards && r.advantage[1] == 0.5);
    cr_expect_arr_eq(r.tokens, ((int32_t[]){5, 6, 7, 5, 6, 8, 9}), 7 * sizeof(int32_t));
    cr_expect_arr_eq(r.loss_mask, ((uint8_t[]){0, 0, 1, 0, 0, 1, 1}), 7);
    cr_expect(r.sampler_logprob[1] == 0 && isnan(r.sampler_logprob[2]) && isnan(r.sampler_logprob[6]));
    cr_expect(r.version[0] == 0 && r.finish[1] == ESPI_FINISH_STOP);
    cr_expect_eq(sum.counted, 3);
    espi_rollout_correction_tell(told, &sum, "tis");
    cr_expect_not_null(strstr(told, "no sampler log-probabilities"), "%s", told);
    espi_rollouts_free(&r);
    source.close(source.self);
    plain_file(path, 2, false);
    FAILS(ESP_ERR_FORMAT, "attribute \"version\" is 2", espi_file_source(&source, &sum, path, &limits, names, REWARDS));
    plain_file(path, 1, true);
    FAILS(ESP_ERR_FORMAT, "/tokens is int64 [7], expected int32 [tokens]", espi_file_source(&source, &sum, path, &limits, names, REWARDS));
    scratch_remove(dir);
}

/* A dataset's type, dimensions, and whether it is deflated. */
static void plainly(hid_t file, const char *name, hid_t type, int rank, const hsize_t *want, bool deflated) {
    hsize_t dims[3] = {0};
    const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    cr_assert(set >= 0, "no %s", name);
    const hid_t space = H5Dget_space(set), stored = H5Dget_type(set), list = H5Dget_create_plist(set);
    cr_expect(H5Tequal(stored, type) > 0, "%s has another type", name);
    cr_assert_eq(H5Sget_simple_extent_ndims(space), rank);
    H5Sget_simple_extent_dims(space, dims, NULL);
    for (int i = 0; i < rank; i++) cr_expect_eq(dims[i], want[i], "%s has %d in dimension %d", name, (int)dims[i], i);
    cr_expect_eq(H5Pget_layout(list) == H5D_CHUNKED, deflated);
    cr_expect_eq(H5Pget_nfilters(list), deflated);
    H5Pclose(list);
    H5Tclose(stored);
    H5Sclose(space);
    H5Dclose(set);
}

Test(rollouts, other_programs_find_plain_datasets) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], *text[2 * GROUP];
    const char *words[2 * GROUP];
    espi_rollouts r = make(2, ROUTES_16, 3);
    for (int i = 0; i < 2 * GROUP; i++) words[i] = i == 5 ? "na\xC3\xAFve" : "x";
    scratch_make(dir);
    OK(espi_path_join(path, dir, "r.h5"));
    OK(espi_rollouts_save(path, &r, words, words, &known));
    cr_expect_eq(scratch_count(dir), 1, "a temporary file is left");
    const hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    const hsize_t rows = 2 * GROUP, borders = rows + 1, tokens = (hsize_t)r.shape.tokens, scores[2] = {rows, REWARDS};
    const hsize_t routes[3] = {tokens, LAYERS, TOP_K};
    plainly(file, "tokens", H5T_STD_I32LE, 1, &tokens, false);
    plainly(file, "seq_offsets", H5T_STD_I64LE, 1, &borders, false);
    plainly(file, "prompt_len", H5T_STD_I32LE, 1, &rows, false);
    plainly(file, "group_id", H5T_STD_I64LE, 1, &rows, false);
    plainly(file, "rewards", H5T_IEEE_F32LE, 2, scores, false);
    plainly(file, "sampler_logprob", H5T_IEEE_F32LE, 1, &tokens, false);
    plainly(file, "loss_mask", H5T_STD_U8LE, 1, &tokens, false);
    plainly(file, "truncated", H5T_STD_U8LE, 1, &rows, false);
    plainly(file, "routed_experts", H5T_STD_U16LE, 3, routes, true);
    const hid_t set = H5Dopen2(file, "text/completion", H5P_DEFAULT), type = H5Dget_type(set), space = H5Dget_space(set);
    cr_expect(H5Tis_variable_str(type) > 0 && H5Tget_cset(type) == H5T_CSET_UTF8);
    cr_assert(H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text) >= 0);
    cr_expect_str_eq(text[5], "na\xC3\xAFve");
    H5Dvlen_reclaim(type, space, H5P_DEFAULT, text);
    H5Sclose(space);
    H5Tclose(type);
    H5Dclose(set);
    double temperature = 0;
    const hid_t attribute = H5Aopen(file, "temperature", H5P_DEFAULT);
    cr_assert(H5Aread(attribute, H5T_NATIVE_DOUBLE, &temperature) >= 0);
    cr_expect_eq(temperature, 0.75);
    H5Aclose(attribute);
    H5Fclose(file);
    espi_rollouts_free(&r);
    scratch_remove(dir);
}

/* ---- faults ---- */

/* The file of r, read as a source; r is freed. */
static esp_status judge(espi_rollouts *r, const espi_rollout_facts *facts) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    espi_rollout_source source;
    espi_rollout_summary sum;
    scratch_make(dir);
    OK(espi_path_join(path, dir, "r.h5"));
    OK(espi_rollouts_save(path, r, NULL, NULL, facts));
    const esp_status status = espi_file_source(&source, &sum, path, &limits, names, REWARDS);
    if (status == ESP_OK) source.close(source.self);
    espi_rollouts_free(r);
    scratch_remove(dir);
    return status;
}

#define BROKEN(parts, words, breaking)                                                                                                     \
    do {                                                                                                                                   \
        espi_rollouts r = make(3, parts, 7);                                                                                               \
        const int64_t first = r.offsets[5], answer = first + r.n_prompt[5], end = r.offsets[6];                                            \
        (void)first, (void)answer, (void)end;                                                                                              \
        breaking;                                                                                                                          \
        FAILS(ESP_ERR_FORMAT, words, judge(&r, &known));                                                                                   \
    } while (0)

Test(rollouts, faults_are_named_with_their_place) {
    BROKEN(0, "/seq_offsets go from 1 to", r.offsets[0] = 1);
    BROKEN(0, "/seq_offsets[6] is", r.offsets[6] = r.offsets[5]);
    BROKEN(0, "row 5: /prompt_len is 0", r.n_prompt[5] = 0);
    BROKEN(0, "expected at least one token of each kind", r.n_prompt[5] = (int32_t)(end - first));
    BROKEN(0, "row 4: group 77 has 1 rows in a row, expected 4", r.group[4] = 77);
    BROKEN(0, "group 900 comes again further down", for (int i = 8; i < 12; i++) r.group[i] = 900);
    BROKEN(0, "row 5: its token 1 is 1000, expected 0 to 999", r.tokens[first + 1] = VOCAB);
    BROKEN(0, "row 5: its token 0 is -1", r.tokens[first] = -1);
    BROKEN(0, "row 5: /loss_mask is 1 at its token 0, expected 0: it is the prompt's", r.loss_mask[first] = 1);
    BROKEN(0, "row 5: /loss_mask is 2", r.loss_mask[answer] = 2);
    BROKEN(0, "row 5: /sampler_logprob is -inf", r.sampler_logprob[answer] = -INFINITY);
    BROKEN(0, "row 5: /sampler_logprob is 0.5", r.sampler_logprob[end - 1] = 0.5f);
    BROKEN(0, "row 5: /truncated is 3", r.finish[5] = 3);
    BROKEN(0, "row 5: reward 1 is inf", r.rewards[11] = INFINITY);
    BROKEN(ADVANTAGES, "row 5: /advantage is nan", r.advantage[5] = NAN);
    BROKEN(0, "row 5: /adapter_version is -2", r.version[5] = -2);
    BROKEN(ROUTES_8, "was routed to expert 7 in layer 1, expected 0 to 6", set_route(&r, first * 6 + 2, EXPERTS));
    BROKEN(ROUTES_16, "row 5: its token 0 was routed to expert 255", set_route(&r, first * 6 + 5, 255));
    BROKEN(KEPT_IDS, "and its kept ids lack it", {
        r.kept_ids[r.kept_offsets[answer]] = r.tokens[answer] - 1;
        r.kept_ids[r.kept_offsets[answer] + 1] = r.tokens[answer] + 1;
    });
    BROKEN(KEPT_IDS, "expected ascending ids", r.kept_ids[r.kept_offsets[answer]] = 999);
    BROKEN(KEPT_IDS, "/kept_offsets[", r.kept_offsets[answer + 1] = r.kept_offsets[answer] - 1);
    espi_rollouts fine = make(3, KEPT_IDS | ROUTES_8, 7);
    OK(judge(&fine, &known));
}

Test(rollouts, files_of_another_run) {
    espi_rollout_facts facts = known;
    espi_rollouts r = make(2, 0, 1);
    facts.vocab_size = 999;
    FAILS(ESP_ERR_MISMATCH, "for a vocabulary of 999, expected 1000", judge(&r, &facts));
    facts = known;
    facts.tokenizer_hash[3] = 'x';
    r = make(2, 0, 1);
    FAILS(ESP_ERR_MISMATCH, "tokenizer_hash is 012x", judge(&r, &facts));
    facts = known;
    facts.top_p = 0.9;
    r = make(2, 0, 1);
    FAILS(ESP_ERR_FORMAT, "top_p 0.9, min_p 0 and has no /kept_ids", judge(&r, &facts));
    r = make(2, KEPT_IDS, 1);
    OK(judge(&r, &facts));
    facts = known;
    facts.reward_names = (char[REWARDS][ESPI_ROLLOUT_TEXT]){"format", "exact"};
    r = make(2, 0, 1);
    FAILS(ESP_ERR_MISMATCH, "reward 0 is \"format\", expected \"exact\"", judge(&r, &facts));
    r = make(2, ADVANTAGES, 1);
    OK(judge(&r, &facts));
    /* Rewards that a float does not hold are refused before they are written. */
    r = make(2, 0, 1);
    r.rewards[3] = 0.1;
    FAILS(ESP_ERR_INTERNAL, "value 3 is 0.1", espi_rollouts_save("/tmp/never", &r, NULL, NULL, &known));
    espi_rollouts_free(&r);
}

static void ask(espi_rollout_source *source, esp_status code, const char *words, espi_rollout_request q) {
    espi_rollouts r = {0};
    FAILS(code, words, source->generate(source->self, &r, &q));
    espi_rollouts_free(&r);
}

Test(rollouts, a_folder_is_one_source) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    espi_rollout_source source;
    espi_rollout_summary sum;
    espi_rollouts a = make(3, 0, 1), b = make(2, 0, 2), both = {0}, got = {0};
    scratch_make(dir);
    FAILS(ESP_ERR_FORMAT, "no file *.h5", espi_file_source(&source, &sum, dir, &limits, names, REWARDS));
    OK(espi_path_join(path, dir, "2.h5"));
    OK(espi_rollouts_save(path, &b, NULL, NULL, &known));
    OK(espi_path_join(path, dir, "1.h5"));
    OK(espi_rollouts_save(path, &a, NULL, NULL, &known));
    scratch_write(path, dir, "notes.txt", "x", 1);
    OK(espi_rollouts_append(&both, &a));
    OK(espi_rollouts_append(&both, &b));
    OK(espi_rollouts_select(&both, (const int64_t[]){1, 2, 3, 4}, 4));
    OK(espi_file_source(&source, &sum, dir, &limits, names, REWARDS));
    cr_expect_eq(sum.groups, 5);
    cr_expect_eq(sum.tokens, a.shape.tokens + b.shape.tokens);
    espi_rollout_request q = request(1, 4, false);
    OK(source.generate(source.self, &got, &q));
    same(&both, &got);
    ask(&source, ESP_ERR_STATE, "groups 4 to 5 are asked for, and there are 5", request(4, 2, false));
    ask(&source, ESP_ERR_UNSUPPORTED, "no /routed_experts to replay", request(0, 2, true));
    q.samples = 8;
    ask(&source, ESP_ERR_MISMATCH, "set group_size to 4", q);
    q = request(0, 1, false);
    q.temperature = 1;
    ask(&source, ESP_ERR_MISMATCH, "sampled at temperature 0.75, expected 1", q);
    source.close(source.self);
    OK(espi_path_join(path, dir, "3.h5"));
    plain_file(path, 1, false);
    FAILS(ESP_ERR_FORMAT, "groups of 2 rows, expected 4, as in", espi_file_source(&source, &sum, dir, &limits, names, REWARDS));
    espi_rollouts_free(&a);
    espi_rollouts_free(&b);
    espi_rollouts_free(&both);
    espi_rollouts_free(&got);
    scratch_remove(dir);
}

Test(rollouts, files_that_are_none) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], *bytes;
    espi_rollout_source source;
    espi_rollout_summary sum;
    size_t n;
    scratch_make(dir);
    OK(espi_path_join(path, dir, "r.h5"));
    FAILS(ESP_ERR_IO, "no such file", espi_file_source(&source, &sum, path, &limits, names, REWARDS));
    scratch_write(path, dir, "r.h5", "{\"step\":1}\n", 11);
    FAILS(ESP_ERR_FORMAT, "HDF5 does not read it", espi_file_source(&source, &sum, path, &limits, names, REWARDS));
    espi_rollouts r = make(3, ROUTES_8, 1);
    OK(espi_rollouts_save(path, &r, NULL, NULL, &known));
    OK(espi_file_read_all(&bytes, &n, path, 1 << 20));
    for (size_t cut = n - 1; cut > n / 50; cut -= n / 50) {
        scratch_write(path, dir, "r.h5", bytes, cut);
        const esp_status status = espi_file_source(&source, &sum, path, &limits, names, REWARDS);
        cr_expect(status == ESP_ERR_FORMAT || status == ESP_ERR_IO, "cut to %zu of %zu bytes: %s", cut, n, esp_status_name(status));
    }
    OK(espi_path_join(path, dir, "absent/r.h5"));
    FAILS(ESP_ERR_IO, "cannot write 12 rollouts", espi_rollouts_save(path, &r, NULL, NULL, &known));
    free(bytes);
    espi_rollouts_free(&r);
    scratch_remove(dir);
}

static void says(int code, const char *command, const char *words) {
    const program_run run = program(command);
    cr_expect_eq(run.code, code, "%s: exit status %d\n%s", command, run.code, run.out);
    cr_expect_not_null(strstr(run.out, words), "no \"%s\" in\n%s", words, run.out);
    free(run.out);
}

Test(rollouts, the_command) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], command[2 * ESPI_PATH_MAX];
    espi_rollouts r = make(3, ROUTES_8, 1);
    scratch_make(dir);
    OK(espi_path_join(path, dir, "r.h5"));
    OK(espi_rollouts_save(path, &r, NULL, NULL, &known));
    snprintf(command, sizeof command, ESP_PROGRAM " rollouts check %s", path);
    says(0, command, "12 in 3 groups of 4");
    says(0, command, "2: exact, format;");
    says(0, command, "temperature 0.75");
    says(0, command, "adapter versions    3 to 4");
    says(0, command, "\nok\n");
    r.tokens[r.offsets[7]] = VOCAB;
    OK(espi_rollouts_save(path, &r, NULL, NULL, &known));
    says(1, command, "row 7: its token 0 is 1000");
    snprintf(command, sizeof command, ESP_PROGRAM " rollouts check %s --model " ESP_SOURCE_DIR "/examples/models/mix-moe", path);
    says(1, command, "for a vocabulary of 1000, expected");
    says(2, ESP_PROGRAM " rollouts chekc x", "it knows check");
    says(2, ESP_PROGRAM " rollouts check", "FILE.h5 is missing");
    espi_rollouts_free(&r);
    scratch_remove(dir);
}
