/* Adapters as PEFT files: written whole under temporary names, then renamed.
 *
 * Of several ranks: where everything lies in the file is known before anything is written, so each writes what it has where it belongs.  Of
 * the fused B [out, r*E], where the experts' columns take turns, every rank has a little of every row: blocks of rows are exchanged, and
 * each is written by one rank.  The bytes do not depend on the ranks. */
#include "core/log.h"
#include "core/status.h"
#include "io/adapter.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "kernels/plain.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- which form ---- */

/* Is B of this rank's experts block-diagonal, gate's rows over the first half of the ranks and up's over the second?  *any: some is not 0. */
static bool is_diagonal(bool *any, const espi_adapter_image *image) {
    const esp_model *m = image->model;
    const int64_t r = m->lora[ESPI_T_GATE_UP].r;
    const bool interleaved = m->config.glu.interleaved;
    *any = false;
    if (r % 2) return false;
    for (int64_t l = 0; l < m->config.layers; l++) {
        const espi_layer *w = &m->layers[l];
        if (w->mlp != ESPI_MLP_MOE) continue;
        for (int64_t o = 0; o < w->gate_up.experts * w->gate_up.rows; o++) {
            const int64_t row = o % w->gate_up.rows;
            const bool up = interleaved ? row % 2 : row >= w->gate_up.rows / 2;
            for (int64_t k = 0; k < r; k++) {
                if (espi_adapter_image_get(image, w->lora_gate_up.b, o * r + k) == 0) continue;
                if (up != (k >= r / 2)) return false;
                *any = true;
            }
        }
    }
    return true;
}

/* Of the experts of all ranks; all zero does not count. */
static esp_status find_separate(bool *separate, const espi_adapter_image *image) {
    const espi_share *share = &image->model->share;
    bool mine[2], *all = calloc((size_t)share->ranks, sizeof mine);
    if (!all) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for what %d ranks say", share->ranks);
    mine[0] = is_diagonal(&mine[1], image);
    const esp_status status = espi_comm_gather(share->comm, (espi_place){"the form of an adapter", -1}, all, mine, sizeof mine);
    bool diagonal = true, any = false;
    for (int r = 0; r < share->ranks; r++) {
        diagonal = diagonal && all[2 * r];
        any = any || all[2 * r + 1];
    }
    free(all);
    *separate = diagonal && any;
    return status;
}

static esp_status choose_layout(espi_adapter_layout *layout, const espi_adapter_image *image, const esp_adapter_config *config) {
    const esp_model *m = image->model;
    const espi_family *f = m->config.family;
    if ((unsigned)config->form > ESP_ADAPTER_3D || (unsigned)config->columns > ESP_ADAPTER_EXPERT_SLOWEST)
        return ESPI_FAIL(ESP_ERR_ARG, "form, columns: got %d, %d, expected values of esp_adapter_form and esp_adapter_columns",
                         (int)config->form, (int)config->columns);
    if (config->widths == ESP_ADAPTER_WIDTHS_SWAPPED)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "widths: got swapped, expected true: that form is read only, nothing needs it any more");
    const bool fused = config->form == ESP_ADAPTER_3D || (config->form == ESP_ADAPTER_FORM_DEFAULT && f->fused_experts);
    const bool experts = m->lora[ESPI_T_GATE_UP].r || m->lora[ESPI_T_DOWN].r;
    if (!fused && experts && f->fused_experts)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "form: got 2-D, expected 3-D: %s has no module per expert that an adapter could name",
                         f->name);
    if (!fused && config->columns == ESP_ADAPTER_EXPERT_SLOWEST)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "columns: got expert-slowest with the 2-D form, expected the 3-D form, which has such columns");
    *layout = (espi_adapter_layout){.slowest = config->columns == ESP_ADAPTER_EXPERT_SLOWEST};
    layout->fused[ESPI_STACK_GATE_UP] = fused && m->lora[ESPI_T_GATE_UP].r;
    layout->fused[ESPI_STACK_DOWN] = fused && m->lora[ESPI_T_DOWN].r;
    return !fused && m->lora[ESPI_T_GATE_UP].r ? find_separate(&layout->separate, image) : ESP_OK;
}

/* ---- tensors ---- */

/* The file on its way. */
typedef struct writer {
    const espi_adapter_image *image;
    const espi_share *share;
    esp_dtype dtype;
    size_t size; /* of a value */
    char path[ESPI_PATH_MAX], temp[ESPI_PATH_MAX];
    espi_adapter_entry *entries;
    size_t n;
    uint64_t *offsets; /* [n] */
    char *header;
    size_t header_bytes;
    unsigned char *block, *sent, *got; /* values of ESPI_ADAPTER_PIECE, or of one row where that is more */
    espi_shared *file;
    esp_status status; /* of what this rank alone does; the calls to the others are made all the same */
} writer;

/* Rows first .. first+rows-1, all columns, which lie in w->block. */
static void write_block(writer *w, const espi_adapter_entry *e, int64_t first, int64_t rows) {
    const size_t row = (size_t)e->cols.n * w->size;
    if (w->status == ESP_OK && rows > 0)
        w->status = espi_shared_write(w->file, w->block, (size_t)rows * row, w->offsets[e - w->entries] + (size_t)first * row);
}

static float value_at(const writer *w, const espi_adapter_entry *e, int64_t i, int64_t j) {
    return espi_adapter_image_get(w->image, e->parameter, espi_adapter_at(e, i, j));
}

static int64_t rows_at_once(const espi_adapter_entry *e) {
    return ESPI_ADAPTER_PIECE / e->cols.n > 0 ? ESPI_ADAPTER_PIECE / e->cols.n : 1;
}

/* Rows that one rank has whole. */
static void write_rows(writer *w, const espi_adapter_entry *e) {
    const int64_t most = rows_at_once(e);
    int64_t begin, end;
    espi_adapter_own_rows(&begin, &end, e, w->share);
    for (int64_t first = begin; first < end && w->status == ESP_OK; first += most) {
        const int64_t rows = end - first < most ? end - first : most;
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < e->cols.n; j++) espi_plain_store(w->block, w->dtype, i * e->cols.n + j, value_at(w, e, first + i, j));
        write_block(w, e, first, rows);
    }
}

/* A round of a tensor whose columns are of all experts: of member m's rows those from first(m) on. */
typedef struct turn {
    const espi_adapter_entry *e;
    int64_t round, most;                            /* rows of a member in one round */
    int64_t *to_at, *to_rows, *from_at, *from_rows; /* [ranks] in units of one row of one expert */
} turn;

static int64_t turn_rows(int64_t *first, const turn *t, const espi_share *s, int m) {
    const int64_t begin = t->e->rows.n * m / s->spread, end = t->e->rows.n * (m + 1) / s->spread;
    *first = begin + t->round * t->most;
    return *first >= end ? 0 : end - *first < t->most ? end - *first : t->most;
}

static int64_t experts_of(const espi_share *s, int m) {
    return espi_share_border(s, m + 1) - espi_share_border(s, m);
}

/* Column k of expert e. */
static int64_t column(const espi_adapter_entry *entry, const espi_share *s, int64_t e, int64_t k) {
    return entry->slowest ? e * entry->r + k : k * s->experts + e;
}

/* What every member has of the rows that each is to write. */
static void fill_turn(writer *w, turn *t) {
    const espi_share *s = w->share;
    int64_t first, sent = 0, got = 0, n = 0;
    const bool member = s->rank < s->spread;
    for (int p = 0; p < s->ranks; p++) {
        const bool other = member && p < s->spread;
        const int64_t theirs = other ? turn_rows(&first, t, s, p) : 0;
        for (int64_t i = 0; i < theirs; i++)
            for (int64_t e = s->first; e < s->first + s->count; e++)
                for (int64_t k = 0; k < t->e->r; k++)
                    espi_plain_store(w->sent, w->dtype, n++, value_at(w, t->e, first + i, column(t->e, s, e, k)));
        t->from_at[p] = sent;
        t->from_rows[p] = theirs * s->count;
        sent += t->from_rows[p];
        t->to_at[p] = got;
        t->to_rows[p] = other ? turn_rows(&first, t, s, s->rank) * experts_of(s, p) : 0;
        got += t->to_rows[p];
    }
}

/* The rows that this rank got, in the order of the file. */
static void place_turn(writer *w, const turn *t) {
    const espi_share *s = w->share;
    const unsigned char *from = w->got;
    int64_t first;
    const int64_t rows = s->rank < s->spread ? turn_rows(&first, t, s, s->rank) : 0;
    for (int p = 0; p < s->spread && rows > 0; p++)
        for (int64_t i = 0; i < rows; i++)
            for (int64_t e = espi_share_border(s, p); e < espi_share_border(s, p + 1); e++)
                for (int64_t k = 0; k < t->e->r; k++, from += w->size)
                    memcpy(w->block + (size_t)(i * t->e->cols.n + column(t->e, s, e, k)) * w->size, from, w->size);
    if (rows > 0) write_block(w, t->e, first, rows);
}

/* Of the ranks that hold the same experts the first group writes; the others take part in the calls. */
static esp_status write_columns(writer *w, const espi_adapter_entry *e) {
    const espi_share *s = w->share;
    int64_t *at = calloc(4 * (size_t)s->ranks, sizeof *at);
    if (!at) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for what goes to %d ranks", w->path, s->ranks);
    const size_t n = (size_t)s->ranks;
    turn t = {.e = e, .to_at = at, .to_rows = at + n, .from_at = at + 2 * n, .from_rows = at + 3 * n};
    t.most = rows_at_once(e) / s->spread > 0 ? rows_at_once(e) / s->spread : 1;
    const int64_t most_rows = (e->rows.n + s->spread - 1) / s->spread;
    const espi_row_array array = {.to = w->got, .from = w->sent, .row_bytes = (size_t)e->r * w->size};
    esp_status status = ESP_OK;
    for (; t.round * t.most < most_rows && status == ESP_OK; t.round++) {
        fill_turn(w, &t);
        status = espi_comm_exchange(s->comm, (espi_place){"rows of an adapter", -1}, &array, 1, (espi_row_ranges){t.to_at, t.to_rows},
                                    (espi_row_ranges){t.from_at, t.from_rows});
        if (status == ESP_OK) place_turn(w, &t);
    }
    free(at);
    return status;
}

static esp_status write_entries(writer *w) {
    const espi_share *s = w->share;
    for (size_t i = 0; i < w->n; i++) {
        const espi_adapter_entry *e = &w->entries[i];
        if (e->of == ESPI_OF_EXPERT_COLS)
            ESPI_TRY(write_columns(w, e));
        else if (e->of == ESPI_OF_ALL ? (int)(i % (size_t)s->ranks) == s->rank : espi_share_speaks(s, true))
            write_rows(w, e);
    }
    return ESP_OK;
}

/* What the file has where, and room for its pieces. */
static esp_status plan_file(writer *w, const char *dir, const espi_adapter_layout *layout) {
    ESPI_TRY(espi_path_join(w->path, dir, ESPI_ADAPTER_WEIGHTS));
    ESPI_TRY(espi_file_temp_name(w->temp, w->path));
    ESPI_TRY(espi_adapter_list(&w->entries, &w->n, w->image->model, layout));
    espi_st_item *items = calloc(w->n + 1, sizeof *items);
    w->offsets = calloc(w->n + 1, sizeof *w->offsets);
    if (!items || !w->offsets) {
        free(items);
        return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its list of tensors", w->path);
    }
    int64_t values = ESPI_ADAPTER_PIECE;
    for (size_t i = 0; i < w->n; i++) {
        const espi_adapter_entry *e = &w->entries[i];
        items[i] = (espi_st_item){.name = e->key, .dtype = w->dtype, .rank = 2, .dims = {e->rows.n, e->cols.n}};
        if (e->cols.n * w->share->spread > values) values = e->cols.n * w->share->spread; /* one row of every member */
    }
    const esp_status status = espi_st_layout(&w->header, &w->header_bytes, w->offsets, w->path, items, w->n);
    free(items);
    ESPI_TRY(status);
    w->block = malloc(3 * (size_t)values * w->size);
    if (!w->block) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %lld values on their way", w->path, (long long)(3 * values));
    w->sent = w->block + (size_t)values * w->size;
    w->got = w->sent + (size_t)values * w->size;
    return ESP_OK;
}

/* The first rank makes the file, under a name that it tells the others. */
static esp_status make_file(writer *w, const char *dir) {
    const espi_share *s = w->share;
    esp_status status = ESP_OK;
    if (s->rank == 0) {
        status = espi_dir_make(dir);
        if (status == ESP_OK) status = espi_shared_open(&w->file, w->temp, true);
        if (status == ESP_OK) status = espi_shared_write(w->file, w->header, w->header_bytes, 0);
    }
    char *names = calloc((size_t)s->ranks, ESPI_PATH_MAX);
    if (!names && status == ESP_OK) status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the names of %d ranks", w->path, s->ranks);
    status = espi_comm_agree(s->comm, (espi_place){"making an adapter's file", -1}, status);
    if (status == ESP_OK) status = espi_comm_gather(s->comm, (espi_place){"an adapter's file", -1}, names, w->temp, ESPI_PATH_MAX);
    if (status == ESP_OK && names && s->rank > 0) {
        memcpy(w->temp, names, ESPI_PATH_MAX);
        w->status = espi_shared_open(&w->file, w->temp, false);
    }
    free(names);
    return status;
}

static esp_status write_weights(const espi_adapter_image *image, const char *dir, const espi_adapter_layout *layout, esp_dtype dtype) {
    const espi_share *s = &image->model->share;
    writer w = {.image = image, .share = s, .dtype = dtype, .size = esp_dtype_size(dtype)};
    esp_status status = espi_comm_agree(s->comm, (espi_place){"planning an adapter's file", -1}, plan_file(&w, dir, layout));
    if (status == ESP_OK) status = make_file(&w, dir);
    if (status == ESP_OK) status = write_entries(&w);
    const esp_status closed = espi_shared_close(w.file);
    if (w.status == ESP_OK) w.status = closed;
    if (status == ESP_OK) status = espi_comm_agree(s->comm, (espi_place){"writing an adapter", -1}, w.status);
    if (s->rank == 0 && status == ESP_OK) status = espi_file_commit(w.path, w.temp);
    if (s->rank == 0 && status != ESP_OK && *w.temp) espi_file_remove(w.temp);
    free(w.block);
    free(w.header);
    free(w.offsets);
    free(w.entries);
    return status;
}

/* ---- config ---- */

/* A module as the config names it, with what it states. */
typedef struct target {
    const char *name;
    int64_t r;
    double alpha;
    bool fused;
} target;

/* s = alpha / r or alpha / sqrt(r): the alpha that a file would have said, which is a float more often than s is. */
static double alpha_of(const espi_lora_spec *spec, int64_t r, bool rslora) {
    const double divisor = rslora ? sqrt((double)r) : (double)r, exact = spec->scale * divisor, nearest = (float)exact;
    return nearest / divisor == spec->scale ? nearest : exact;
}

/* PEFT makes one fused branch of twice the rank and alpha of gate and up per expert.  Under rsLoRA that is sqrt(2) times the scale, so in
 * this form the scale is stated the plain way, alpha / r, which everybody reads alike. */
static bool says_rslora(const esp_model *m, const espi_adapter_layout *layout) {
    return m->options.rslora && (layout->fused[ESPI_STACK_GATE_UP] || m->lora[ESPI_T_GATE_UP].r == 0);
}

static int targets_of(target out[8], const esp_model *m, const espi_adapter_layout *layout) {
    const espi_family *f = m->config.family;
    int n = 0;
    for (int t = 0; t < ESPI_T_COUNT; t++) {
        if (m->lora[t].r == 0) continue;
        const bool fused = t >= ESPI_T_GATE_UP && layout->fused[t - ESPI_T_GATE_UP];
        const int64_t r = t == ESPI_T_GATE_UP && layout->separate ? m->lora[t].r / 2 : m->lora[t].r;
        target one = {.r = r, .alpha = alpha_of(&m->lora[t], r, says_rslora(m, layout)), .fused = fused};
        if (t <= ESPI_T_O)
            one.name = espi_adapter_last_part(espi_adapter_attention(f, t));
        else if (fused)
            one.name = t == ESPI_T_DOWN ? ESPI_ADAPTER_DOWN : ESPI_ADAPTER_GATE_UP;
        else
            one.name = espi_adapter_last_part(t == ESPI_T_DOWN ? f->expert_down : f->expert_gate);
        out[n++] = one;
        if (t != ESPI_T_GATE_UP || fused) continue;
        one.name = espi_adapter_last_part(f->expert_up);
        out[n++] = one;
    }
    return n;
}

/* 8, not 8.0: some readers want a whole number. */
static json_t *number(double x) {
    return x == floor(x) && fabs(x) < 1e15 ? json_integer((json_int_t)x) : json_real(x);
}

/* "model.layers.%d.mlp.experts" and "down_proj" -> "mlp.experts.down_proj" */
static json_t *parameter_name(const espi_family *f, const char *last) {
    static const char layer[] = "%d.";
    const char *module = strstr(f->experts_module, layer);
    return json_sprintf("%s.%s", module ? module + sizeof layer - 1 : f->experts_module, last);
}

static json_t *config_json(const esp_model *model, const espi_adapter_layout *layout, const target *targets, int n) {
    json_t *modules = json_array(), *parameters = json_array(), *ranks = json_object(), *alphas = json_object();
    for (int i = 0; i < n; i++) {
        const target *t = &targets[i];
        if (t->fused)
            json_array_append_new(parameters, parameter_name(model->config.family, t->name));
        else
            json_array_append_new(modules, json_string(t->name));
        if (t->r != targets[0].r) json_object_set_new(ranks, t->name, json_integer((json_int_t)t->r));
        if (t->alpha != targets[0].alpha) json_object_set_new(alphas, t->name, number(t->alpha));
    }
    if (json_array_size(parameters) == 0) {
        json_decref(parameters);
        parameters = json_null();
    }
    json_t *root =
        json_pack("{s:s, s:s, s:s, s:I, s:o, s:b, s:o, s:o, s:f, s:s, s:b, s:b, s:b, s:b, s:n, s:o, s:o}", "peft_type", "LORA", "task_type",
                  "CAUSAL_LM", "base_model_name_or_path", "", "r", (json_int_t)targets[0].r, "lora_alpha", number(targets[0].alpha),
                  "use_rslora", (int)says_rslora(model, layout), "target_modules", modules, "target_parameters", parameters, "lora_dropout",
                  0.0, "bias", "none", "use_dora", 0, "fan_in_fan_out", 0, "init_lora_weights", 1, "inference_mode", 1, "modules_to_save",
                  "rank_pattern", ranks, "alpha_pattern", alphas);
    if (root && layout->slowest) json_object_set_new(root, "lora_B_layout", json_string("grouped_by_expert"));
    return root;
}

static esp_status write_config(const esp_model *model, const char *dir, const espi_adapter_layout *layout) {
    char path[ESPI_PATH_MAX];
    target targets[8];
    const int n = targets_of(targets, model, layout);
    for (int i = 1; i < n; i++)
        if (fabs(targets[i].alpha / (double)targets[i].r - targets[0].alpha / (double)targets[0].r) > 1e-12 && !says_rslora(model, layout))
            espi_log(model->ctx, ESP_LOG_WARN, "%s: %s and %s have different scales: vLLM, which ignores alpha_pattern, takes one for both",
                     dir, targets[0].name, targets[i].name);
    ESPI_TRY(espi_path_join(path, dir, ESPI_ADAPTER_CONFIG));
    json_t *root = config_json(model, layout, targets, n);
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    const esp_status status = text ? espi_file_write_atomic(path, text, strlen(text)) : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory", path);
    free(text);
    json_decref(root);
    return status;
}

esp_status espi_adapter_write(esp_model *model, const char *dir, const esp_adapter_config *config, esp_dtype dtype) {
    esp_adapter_config asked;
    espi_adapter_layout layout;
    ESPI_TRY(espi_struct_read(&asked, sizeof asked, config, "esp_adapter_config"));
    bool trained = false;
    for (int t = 0; t < ESPI_T_COUNT; t++) trained |= model->lora[t].r > 0;
    if (!trained) return ESPI_FAIL(ESP_ERR_STATE, "adapter: the model trains nothing, expected at least one LoRA target");
    const espi_share *share = &model->share;
    espi_adapter_image image;
    esp_status status = espi_adapter_image_take(&image, model, false);
    status = espi_comm_agree(share->comm, (espi_place){"taking an adapter", -1}, status);
    if (status == ESP_OK) status = choose_layout(&layout, &image, &asked);
    if (status == ESP_OK) status = write_weights(&image, dir, &layout, dtype);
    espi_adapter_image_free(&image);
    if (status == ESP_OK && share->rank == 0) status = write_config(model, dir, &layout);
    return espi_comm_agree(share->comm, (espi_place){"the end of an adapter", -1}, status);
}

esp_status esp_model_save_adapter_as(esp_model *model, const char *dir, const esp_adapter_config *config) {
    if (!model || !dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_save_adapter: model or dir is NULL");
    return espi_adapter_write(model, dir, config, ESP_F32);
}

esp_status esp_model_save_adapter(esp_model *model, const char *dir) {
    return esp_model_save_adapter_as(model, dir, NULL);
}
