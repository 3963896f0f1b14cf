/// espalier: a training runtime for Mixture-of-Experts language models.  This header includes all the others.
///
/// Three levels, each built only on the one before:
///   block    moe.h        one MoE layer on your own tensors
///   model    model.h      a Hugging Face checkpoint: forward to hidden states, losses, backward, adapter files
///            adapter.h      forms of those files, conversion, merging
///            grpo.h optim.h sampler.h tokenizer.h
///   trainer  trainer.h    SFT and GRPO loops with evaluation, checkpoints and logs
///
/// Names of dimensions, the same everywhere:
///   T tokens   E experts   K top-k   H hidden   I expert width   R LoRA rank   V vocabulary   L layers   D head dim
///
/// Every function returns esp_status; esp_last_error() has the sentence.  Every config and stats struct starts with struct_size, filled by
/// its macro; a field left 0 means its default; a NULL config means all defaults.
#ifndef ESPALIER_H
#define ESPALIER_H

#include "espalier/adapter.h"
#include "espalier/ctx.h"
#include "espalier/grpo.h"
#include "espalier/model.h"
#include "espalier/moe.h"
#include "espalier/optim.h"
#include "espalier/plan.h"
#include "espalier/quant.h"
#include "espalier/reward.h"
#include "espalier/sampler.h"
#include "espalier/status.h"
#include "espalier/tensor.h"
#include "espalier/tokenizer.h"
#include "espalier/trainer.h"
#include "espalier/version.h"

/// For programs, not for libraries: prints the sentence and leaves main() (or any function that returns int) with the status.
#define ESP_CHECK(call)                                                                                                                    \
    do {                                                                                                                                   \
        esp_status esp_check_status_ = (call);                                                                                             \
        if (esp_check_status_ != ESP_OK) {                                                                                                 \
            fprintf(stderr, "%s: %s\n", esp_status_name(esp_check_status_), esp_last_error());                                             \
            return (int)esp_check_status_;                                                                                                 \
        }                                                                                                                                  \
    } while (0)
#include <stdio.h> /* for ESP_CHECK */

#endif
