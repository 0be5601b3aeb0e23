-- What the broker does to the books for a single request, which is what a turn has as long as
-- the machine isn't full: the rules of books_admit and books_settle, without what it takes
-- to decide on many at once, which costs a good part of the CPU time. TestOneIsAsMany holds one against
-- the other.
--
-- As with those, the first in the transaction is books_lock.

-- +goose Up

-- +goose StatementBegin
-- Admits one request, or says why not; see books_admit. A lim of null is an open end.
CREATE FUNCTION books_admit_one(
    at timestamptz, owner text, owner_epoch bigint, open_tokens bigint,
    ask_tenant text, ask_key text, ask_model text, ask_id text, prompt bigint, lim bigint, agent text, timeout bigint,
    OUT reason text, OUT granted bigint, OUT reserved_amount bigint, OUT token_price bigint, OUT charged_month date,
    OUT slots integer, OUT slots_free integer, OUT budget bigint, OUT budget_free bigint, OUT wait_ms bigint
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_material = off AS $$
#variable_conflict use_column
DECLARE
    moment     timestamptz := coalesce(at, now());
    this_month date := date_trunc('month', moment AT TIME ZONE 'UTC')::date;
    now_ns     bigint := (extract(epoch FROM moment) * 1000000)::bigint * 1000;
    one_second CONSTANT bigint := 1000000000;
    no_cap     CONSTANT bigint := 4000000000000000000;
    was reservations; k record;
    need bigint := 0; least_need bigint; unspent bigint; free bigint; next_full bigint; allowed bigint := 0;
BEGIN
    SELECT * INTO was FROM reservations r WHERE r.id = ask_id;
    SELECT o.id IS NOT NULL AS alive, t.state AS tenant_state, t.qps, b.full_at,
        q.id, q.tenant_id, q.user_id, q.revoked_at, q.expires_at, q.budget_cents * 1000000 AS cap, coalesce(q.concurrency, 0) AS concurrency,
        u.state AS user_state, coalesce(a.in_flight, 0) AS in_flight, coalesce(m.spent, 0) AS spent, coalesce(m.reserved, 0) AS reserved,
        coalesce((SELECT p.price FROM model_prices p WHERE p.tenant_id = ask_tenant AND p.model = ask_model),
            (SELECT p.price FROM model_prices p WHERE p.tenant_id = '' AND p.model = ask_model), 0) AS price
    INTO k
    FROM (SELECT) AS one
    LEFT JOIN api_keys q ON q.id = ask_key
    LEFT JOIN users u ON u.id = q.user_id
    LEFT JOIN tenants t ON t.id = ask_tenant
    LEFT JOIN tenant_buckets b ON b.tenant_id = ask_tenant
    LEFT JOIN key_accounts a ON a.key_id = ask_key
    LEFT JOIN budgets m ON m.key_id = ask_key AND m.month = this_month
    LEFT JOIN owners o ON o.id = owner AND o.epoch = owner_epoch AND o.held;

    reason := ''; granted := 0; reserved_amount := 0; token_price := 0; charged_month := this_month; wait_ms := 0;
    slots := k.concurrency; budget := k.cap;
    unspent := coalesce(k.cap, no_cap) - k.spent;
    free := unspent - k.reserved;
    IF was.state = 'open' AND was.key_id = ask_key THEN
        -- A second time: its first answer got lost.
        granted := was.limit_tokens; reserved_amount := was.amount; token_price := was.price; charged_month := was.month;
    ELSIF was.id IS NOT NULL THEN
        reason := 'ended';
    ELSIF k.id IS NULL OR k.revoked_at IS NOT NULL OR k.tenant_id <> ask_tenant THEN
        reason := 'key_invalid';
    ELSIF k.expires_at <= moment THEN
        reason := 'key_expired';
    ELSIF k.tenant_state <> 'active' THEN
        reason := 'tenant_disabled';
    ELSIF k.user_state <> 'active' THEN
        reason := 'user_deactivated';
    ELSIF NOT k.alive THEN
        reason := 'lease_lapsed';
    ELSE
        token_price := k.price;
        allowed := coalesce(lim, open_tokens);
        need := ((prompt + allowed) * k.price + 999) / 1000;
        least_need := CASE WHEN lim IS NULL THEN ((prompt + 1) * k.price + 999) / 1000 ELSE need END;
        -- A bucket that is full only long from now was drawn from by a clock that was wrong.
        next_full := greatest(CASE WHEN k.full_at <= now_ns + 60 * one_second THEN k.full_at ELSE 0 END, now_ns) + one_second / coalesce(k.qps, 1);
        IF need > 0 AND least_need > unspent THEN
            reason := 'budget_exceeded';
            wait_ms := ceil(extract(epoch FROM ((this_month + interval '1 month') AT TIME ZONE 'UTC') - moment) * 1000);
        ELSIF next_full > now_ns + one_second THEN
            reason := 'tenant_qps_limit'; wait_ms := (next_full - now_ns - one_second + 999999) / 1000000;
        ELSIF k.in_flight >= k.concurrency THEN
            reason := 'no_slot';
        ELSIF need > 0 AND need > free THEN
            IF lim IS NULL AND least_need <= free AND (k.in_flight = 0 OR k.reserved = 0) THEN
                -- The last of the budget: nobody else will give any of it back.
                allowed := books_tokens(free, k.price) - prompt;
                need := ((prompt + allowed) * k.price + 999) / 1000;
            ELSE
                reason := 'money_held';
            END IF;
        END IF;
        IF reason = '' THEN
            granted := allowed; reserved_amount := need;
            k.in_flight := k.in_flight + 1;
            UPDATE tenant_buckets x SET full_at = next_full WHERE x.tenant_id = ask_tenant;
            UPDATE key_accounts x SET in_flight = k.in_flight WHERE x.key_id = ask_key;
            IF need > 0 THEN
                free := free - need;
                UPDATE budgets x SET reserved = k.reserved + need WHERE x.key_id = ask_key AND x.month = this_month;
                IF NOT FOUND THEN
                    INSERT INTO budgets (key_id, month, reserved) VALUES (ask_key, this_month, need);
                END IF;
            END IF;
            INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
                owner_id, epoch, agent_id, deadline, created_at)
            VALUES (ask_id, ask_key, ask_tenant, k.user_id, ask_model, this_month, k.price, prompt, allowed, need,
                owner, owner_epoch, nullif(agent, ''), moment + timeout * interval '1 millisecond', moment);
        END IF;
    END IF;
    slots_free := greatest(0, slots - k.in_flight);
    budget_free := greatest(0, free);
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Settles one request, and returns the state that it was in; see books_settle.
CREATE FUNCTION books_settle_one(at timestamptz, of_id text, of_key text, prompt bigint, completion bigint, how text) RETURNS text
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_material = off AS $$
DECLARE
    moment timestamptz := coalesce(at, now());
    r reservations; tokens bigint; charge bigint := 0;
BEGIN
    SELECT * INTO r FROM reservations x WHERE x.id = of_id AND x.key_id = of_key;
    IF NOT FOUND THEN
        IF how = 'void' THEN
            INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
                state, in_flight, owner_id, epoch, deadline, created_at, ended_at)
            VALUES (of_id, of_key, '', '', '', 'epoch', 0, 0, 0, 0, 'settled', false, '', 0, moment, moment, moment)
            ON CONFLICT DO NOTHING;
        END IF;
        RETURN 'unknown';
    ELSIF r.state <> 'open' THEN
        RETURN r.state;
    END IF;
    tokens := coalesce(prompt, r.prompt_tokens);
    IF how <> 'void' THEN
        charge := least(r.amount, books_cost(tokens + completion, r.price));
        INSERT INTO ledger (request_id, tenant_id, user_id, key_id, model, agent_id, month, prompt_tokens, completion_tokens, cost, outcome, at)
        VALUES (r.id, r.tenant_id, r.user_id, r.key_id, r.model, r.agent_id, r.month, tokens, completion, charge, how, moment)
        ON CONFLICT DO NOTHING;
    END IF;
    UPDATE reservations x SET state = CASE how WHEN 'expired' THEN 'expired' ELSE 'settled' END, in_flight = false, ended_at = moment
    WHERE x.id = r.id;
    IF r.in_flight THEN
        UPDATE key_accounts x SET in_flight = greatest(0, x.in_flight - 1) WHERE x.key_id = r.key_id;
    END IF;
    IF r.amount > 0 THEN
        UPDATE budgets x SET reserved = greatest(0, x.reserved - r.amount), spent = x.spent + charge
        WHERE x.key_id = r.key_id AND x.month = r.month;
    END IF;
    RETURN 'open';
END $$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION books_settle_one;
DROP FUNCTION books_admit_one;
