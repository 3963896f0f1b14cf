/* Who holds which expert. */
#include "dist/share.h"

#include "core/status.h"

esp_status espi_share_make(espi_share *share, esp_comm *comm, int64_t experts, int spread, int64_t row_budget) {
    const int ranks = esp_comm_size(comm);
    if (spread == 0) spread = ranks;
    if (spread < 1 || ranks % spread != 0)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "expert_ranks: got %d with %d ranks, expected a divisor of that number (0 = all of them, 1 = every rank holds all experts)",
            spread, ranks);
    if (row_budget < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "expert_rows: got %lld, expected the most rows that a rank takes at once, or 0",
                         (long long)row_budget);
    *share = (espi_share){
        .comm = comm, .rank = esp_comm_rank(comm), .ranks = ranks, .spread = spread, .experts = experts, .row_budget = row_budget};
    share->first = espi_share_border(share, espi_share_member(share));
    share->count = espi_share_border(share, espi_share_member(share) + 1) - share->first;
    return ESP_OK;
}
