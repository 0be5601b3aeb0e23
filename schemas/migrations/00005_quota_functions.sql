-- What the broker does to the books for every request, for many requests at once.
--
-- The functions are called one after the other in one transaction, the first of them
-- books_lock, with every tenant and key that the others touch. "at" is the time; if it
-- is null, as always outside of tests, that is now().
--
-- The planner must not judge by how small a table was when a plan was made, because
-- the plan is kept: so plans with sequential scans and joins by hash or merge are out.

-- +goose Up

-- +goose StatementBegin
-- What a number of tokens costs, rounded up.
CREATE FUNCTION books_cost(tokens bigint, price bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT (tokens * price + 999) / 1000';
-- +goose StatementEnd

-- +goose StatementBegin
-- How many tokens an amount pays for, at most 10^8; price isn't 0.
CREATE FUNCTION books_tokens(amount bigint, price bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN amount <= 0 THEN 0
        WHEN amount >= price * 100000 THEN 100000000
        ELSE amount * 1000 / price END
$$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Locks tenants and keys, and makes the rows of those that have none. Everybody goes
-- through here, tenants before keys, each in the order of ids, missing rows before
-- others: so two callers never wait for each other.
CREATE FUNCTION books_lock(tenants text[], keys text[]) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_material = off AS $$
BEGIN
    IF cardinality(tenants) > 0 THEN
        INSERT INTO tenant_buckets (tenant_id)
        SELECT t.id FROM unnest(tenants) AS x (id) JOIN tenants t ON t.id = x.id
        WHERE NOT EXISTS (SELECT FROM tenant_buckets b WHERE b.tenant_id = x.id)
        ORDER BY t.id ON CONFLICT DO NOTHING;
        PERFORM FROM tenant_buckets b WHERE b.tenant_id = ANY (tenants) ORDER BY b.tenant_id FOR NO KEY UPDATE;
    END IF;
    INSERT INTO key_accounts (key_id)
    SELECT k.id FROM unnest(keys) AS x (id) JOIN api_keys k ON k.id = x.id
    WHERE NOT EXISTS (SELECT FROM key_accounts a WHERE a.key_id = x.id)
    ORDER BY k.id ON CONFLICT DO NOTHING;
    PERFORM FROM key_accounts a WHERE a.key_id = ANY (keys) ORDER BY a.key_id FOR NO KEY UPDATE;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Admits requests, in the order of the arrays, or says why not; what is refused takes
-- nothing. tenants and keys are without repetition, and the others point into them:
-- key_tenants for each key; ask_keys, and ask_prices (into price_tenants and
-- price_models), for each request. A limit of null is an open end: the request gets
-- open_tokens, or what is left. timeouts are in milliseconds. There is one row for
-- each request, in order; reason is empty for one that is admitted, now or before.
CREATE FUNCTION books_admit(
    at timestamptz, owner text, owner_epoch bigint, open_tokens bigint,
    tenants text[], keys text[], key_tenants integer[],
    price_tenants text[], price_models text[],
    ids text[], ask_keys integer[], ask_prices integer[],
    prompts bigint[], limits bigint[], agents text[], timeouts bigint[]
) RETURNS TABLE (
    reason text, granted bigint, reserved_amount bigint, token_price bigint, charged_month date,
    slots integer, slots_free integer, budget bigint, budget_free bigint, wait_ms bigint
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_material = off AS $$
#variable_conflict use_column
DECLARE
    moment       timestamptz := coalesce(at, now());
    this_month   date := date_trunc('month', moment AT TIME ZONE 'UTC')::date;
    month_end_ms bigint := ceil(extract(epoch FROM ((this_month + interval '1 month') AT TIME ZONE 'UTC') - moment) * 1000);
    now_ns       bigint := (extract(epoch FROM moment) * 1000000)::bigint * 1000;
    one_second   CONSTANT bigint := 1000000000;
    -- Without a budget there is still a cap, far below where a bigint ends.
    no_cap       CONSTANT bigint := 4000000000000000000;

    full_times bigint[]; step bigint[]; -- of each tenant
    invalid text[]; key_users text[]; caps bigint[]; max_flying integer[]; flying integer[]; spent_now bigint[]; reserved_now bigint[];
    prices  bigint[];
    states  text[]; old_keys text[]; old_limits bigint[]; old_amounts bigint[]; old_prices bigint[]; old_months date[];
    n       integer := cardinality(ids);

    reasons text[] := array_fill(''::text, ARRAY[n]);
    fresh   boolean[] := array_fill(false, ARRAY[n]);
    lims    bigint[] := array_fill(0::bigint, ARRAY[n]);
    needs   bigint[] := array_fill(0::bigint, ARRAY[n]);
    rates   bigint[] := array_fill(0::bigint, ARRAY[n]);
    months  date[] := array_fill(this_month, ARRAY[n]);
    free_slots integer[] := array_fill(0, ARRAY[n]);
    free_money bigint[] := array_fill(0::bigint, ARRAY[n]);
    waits   bigint[] := array_fill(0::bigint, ARRAY[n]);
    drew    boolean[] := array_fill(false, ARRAY[cardinality(tenants)]);
    took    boolean[] := array_fill(false, ARRAY[cardinality(keys)]);
    paid    boolean[] := array_fill(false, ARRAY[cardinality(keys)]);

    k integer; t integer; price bigint; lim bigint; need bigint; least_need bigint; unspent bigint; free bigint; next_full bigint; alive boolean;
BEGIN
    alive := EXISTS (SELECT FROM owners o WHERE o.id = owner AND o.epoch = owner_epoch AND o.held);

    -- A bucket that is full only long from now was drawn from by a clock that was wrong.
    SELECT array_agg(x.full_at), array_agg(one_second / coalesce(x.qps, 1)) INTO full_times, step
    FROM (SELECT CASE WHEN b.full_at <= now_ns + 60 * one_second THEN b.full_at ELSE 0 END AS full_at, q.qps
        FROM unnest(tenants) WITH ORDINALITY AS a (id, n)
        LEFT JOIN tenants q ON q.id = a.id LEFT JOIN tenant_buckets b ON b.tenant_id = a.id ORDER BY a.n) AS x;

    SELECT array_agg(x.invalid), array_agg(x.user_id), array_agg(x.cap), array_agg(x.concurrency),
        array_agg(x.in_flight), array_agg(x.spent), array_agg(x.reserved)
    INTO invalid, key_users, caps, max_flying, flying, spent_now, reserved_now
    FROM (SELECT CASE
            WHEN q.id IS NULL OR q.revoked_at IS NOT NULL OR q.tenant_id <> tenants[a.tenant] THEN 'key_invalid'
            WHEN q.expires_at <= moment THEN 'key_expired'
            WHEN o.state <> 'active' THEN 'tenant_disabled'
            WHEN u.state <> 'active' THEN 'user_deactivated' END AS invalid,
            q.user_id, q.budget_cents * 1000000 AS cap, coalesce(q.concurrency, 0) AS concurrency,
            coalesce(c.in_flight, 0) AS in_flight, coalesce(b.spent, 0) AS spent, coalesce(b.reserved, 0) AS reserved
        FROM unnest(keys, key_tenants) WITH ORDINALITY AS a (id, tenant, n)
        LEFT JOIN api_keys q ON q.id = a.id
        LEFT JOIN users u ON u.id = q.user_id
        LEFT JOIN tenants o ON o.id = q.tenant_id
        LEFT JOIN key_accounts c ON c.key_id = a.id
        LEFT JOIN budgets b ON b.key_id = a.id AND b.month = this_month
        ORDER BY a.n) AS x;

    SELECT array_agg(x.price) INTO prices
    FROM (SELECT coalesce(own.price, everyones.price, 0) AS price
        FROM unnest(price_tenants, price_models) WITH ORDINALITY AS a (tenant, model, n)
        LEFT JOIN model_prices own ON own.tenant_id = a.tenant AND own.model = a.model
        LEFT JOIN model_prices everyones ON everyones.tenant_id = '' AND everyones.model = a.model
        ORDER BY a.n) AS x;

    SELECT array_agg(x.state), array_agg(x.key_id), array_agg(x.limit_tokens), array_agg(x.amount), array_agg(x.price), array_agg(x.month)
    INTO states, old_keys, old_limits, old_amounts, old_prices, old_months
    FROM (SELECT r.state, r.key_id, r.limit_tokens, r.amount, r.price, r.month
        FROM unnest(ids) WITH ORDINALITY AS a (id, n) LEFT JOIN reservations r ON r.id = a.id ORDER BY a.n) AS x;

    FOR i IN 1 .. n LOOP
        k := ask_keys[i]; t := key_tenants[k]; price := prices[ask_prices[i]];
        unspent := coalesce(caps[k], no_cap) - spent_now[k];
        free := unspent - reserved_now[k];
        IF states[i] = 'open' AND old_keys[i] = keys[k] THEN
            -- A second time: its first answer got lost.
            lims[i] := old_limits[i]; needs[i] := old_amounts[i]; rates[i] := old_prices[i]; months[i] := old_months[i];
        ELSIF states[i] IS NOT NULL THEN
            reasons[i] := 'ended';
        ELSIF invalid[k] IS NOT NULL THEN
            reasons[i] := invalid[k];
        ELSIF NOT alive THEN
            reasons[i] := 'lease_lapsed';
        ELSE
            lim := coalesce(limits[i], open_tokens);
            need := ((prompts[i] + lim) * price + 999) / 1000;
            least_need := need;
            IF limits[i] IS NULL THEN
                least_need := ((prompts[i] + 1) * price + 999) / 1000;
            END IF;
            next_full := greatest(full_times[t], now_ns) + step[t];
            IF need > 0 AND least_need > unspent THEN
                reasons[i] := 'budget_exceeded'; waits[i] := month_end_ms;
            ELSIF next_full > now_ns + one_second THEN
                reasons[i] := 'tenant_qps_limit'; waits[i] := (next_full - now_ns - one_second + 999999) / 1000000;
            ELSIF flying[k] >= max_flying[k] THEN
                reasons[i] := 'no_slot';
            ELSE
                IF need > 0 AND need > free THEN
                    IF limits[i] IS NULL AND least_need <= free AND (flying[k] = 0 OR reserved_now[k] = 0) THEN
                        -- The last of the budget: nobody else will give any of it back.
                        lim := books_tokens(free, price) - prompts[i];
                        need := ((prompts[i] + lim) * price + 999) / 1000;
                    ELSE
                        reasons[i] := 'money_held';
                    END IF;
                END IF;
                IF reasons[i] = '' THEN
                    fresh[i] := true; lims[i] := lim; needs[i] := need;
                    full_times[t] := next_full; drew[t] := true;
                    flying[k] := flying[k] + 1; took[k] := true;
                    IF need > 0 THEN
                        reserved_now[k] := reserved_now[k] + need; paid[k] := true;
                        free := free - need;
                    END IF;
                END IF;
            END IF;
            rates[i] := price;
        END IF;
        free_slots[i] := greatest(0, max_flying[k] - flying[k]);
        free_money[i] := greatest(0, free);
    END LOOP;

    UPDATE tenant_buckets b SET full_at = x.full_at
    FROM unnest(tenants, full_times, drew) AS x (id, full_at, drew) WHERE x.drew AND b.tenant_id = x.id;
    UPDATE key_accounts a SET in_flight = x.flying
    FROM unnest(keys, flying, took) AS x (id, flying, took) WHERE x.took AND a.key_id = x.id;
    INSERT INTO budgets (key_id, month, reserved)
    SELECT x.id, this_month, x.reserved FROM unnest(keys, reserved_now, paid) AS x (id, reserved, paid) WHERE x.paid
    ON CONFLICT (key_id, month) DO UPDATE SET reserved = excluded.reserved;
    INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
        owner_id, epoch, agent_id, deadline, created_at)
    SELECT x.id, keys[x.k], tenants[key_tenants[x.k]], key_users[x.k], price_models[x.p], this_month, x.price, x.prompt, x.lim, x.need,
        owner, owner_epoch, nullif(x.agent, ''), moment + x.timeout * interval '1 millisecond', moment
    FROM unnest(ids, ask_keys, ask_prices, rates, prompts, lims, needs, agents, timeouts, fresh)
        AS x (id, k, p, price, prompt, lim, need, agent, timeout, fresh) WHERE x.fresh;

    RETURN QUERY SELECT x.reason, x.lim, x.need, x.price, x.month, max_flying[x.k], x.free_slots, caps[x.k], x.free_money, x.wait
    FROM unnest(reasons, lims, needs, rates, months, ask_keys, free_slots, free_money, waits)
        AS x (reason, lim, need, price, month, k, free_slots, free_money, wait);
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Changes what open requests hold, in the order of the arrays: the size of the prompt,
-- the limit of tokens, the agent that works on it; null leaves one as it is. The limit
-- only rises, as far as there is money, unless the prompt grows by more than that.
-- What was granted is kept even if the cap has been lowered since.
CREATE FUNCTION books_change(ids text[], keys text[], prompts bigint[], limits bigint[], agents text[])
RETURNS TABLE (state text, limit_tokens bigint, amount bigint, others bigint)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_material = off AS $$
#variable_conflict use_column
DECLARE
    no_cap CONSTANT bigint := 4000000000000000000;
    r reservations; cap bigint; b budgets; prompt bigint; lim bigint; need bigint; available bigint;
BEGIN
    FOR i IN 1 .. cardinality(ids) LOOP
        SELECT * INTO r FROM reservations x WHERE x.id = ids[i] AND x.key_id = keys[i];
        IF NOT FOUND OR r.state <> 'open' THEN
            RETURN QUERY SELECT coalesce(r.state, 'unknown'), 0::bigint, 0::bigint, 0::bigint;
            CONTINUE;
        END IF;
        prompt := coalesce(prompts[i], r.prompt_tokens);
        lim := greatest(coalesce(limits[i], r.limit_tokens), r.limit_tokens);
        need := books_cost(prompt + lim, r.price);
        b.reserved := 0; b.spent := 0;
        IF r.price > 0 THEN
            SELECT k.budget_cents * 1000000 INTO cap FROM api_keys k WHERE k.id = r.key_id;
            SELECT * INTO b FROM budgets x WHERE x.key_id = r.key_id AND x.month = r.month;
            available := greatest(coalesce(cap, no_cap) - b.spent - b.reserved, 0) + r.amount;
            IF need > available THEN
                lim := greatest(books_tokens(available, r.price) - prompt, 0);
                need := least(books_cost(prompt + lim, r.price), available);
            END IF;
            IF need <> r.amount THEN
                UPDATE budgets x SET reserved = greatest(0, x.reserved - r.amount + need) WHERE x.key_id = r.key_id AND x.month = r.month;
            END IF;
        END IF;
        UPDATE reservations x SET prompt_tokens = prompt, limit_tokens = lim, amount = need, agent_id = coalesce(agents[i], r.agent_id)
        WHERE x.id = r.id;
        RETURN QUERY SELECT 'open', lim, need, greatest(0, b.reserved - r.amount);
    END LOOP;
END $$;
-- +goose StatementEnd

-- +goose StatementBegin
-- Settles requests: each gives back what it holds, is charged for its tokens, at most
-- what it held, and gets its row in the ledger. A prompt of null is the one that was
-- reserved. The outcome "void" is for a request that was never begun: it is charged
-- nothing and isn't in the ledger, and if it isn't known yet, it can't be admitted any
-- more. There is one row for each request, in no order: the state that it was in.
CREATE FUNCTION books_settle(at timestamptz, ids text[], keys text[], prompts bigint[], completions bigint[], outcomes text[])
RETURNS TABLE (id text, state text)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET enable_material = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY WITH found AS MATERIALIZED (
        SELECT DISTINCT ON (a.id) a.id, a.key_id, a.outcome, coalesce(a.prompt, r.prompt_tokens) AS prompt, a.completion,
            r.tenant_id, r.user_id, r.model, r.agent_id, r.month, r.amount, r.in_flight, r.state,
            CASE a.outcome WHEN 'void' THEN 0
                ELSE least(r.amount, books_cost(coalesce(a.prompt, r.prompt_tokens) + a.completion, r.price)) END AS cost
        FROM unnest(ids, keys, prompts, completions, outcomes) WITH ORDINALITY AS a (id, key_id, prompt, completion, outcome, n)
        LEFT JOIN reservations r ON r.id = a.id AND r.key_id = a.key_id
        ORDER BY a.id, a.n
    ), closed AS (
        UPDATE reservations r SET state = CASE f.outcome WHEN 'expired' THEN 'expired' ELSE 'settled' END,
            in_flight = false, ended_at = coalesce(at, now())
        FROM found f WHERE f.state = 'open' AND r.id = f.id
    ), returned AS (
        UPDATE key_accounts a SET in_flight = greatest(0, a.in_flight - f.n)
        FROM (SELECT key_id, count(*)::integer AS n FROM found WHERE state = 'open' AND in_flight GROUP BY key_id) AS f
        WHERE a.key_id = f.key_id
    ), charged AS (
        UPDATE budgets b SET reserved = greatest(0, b.reserved - f.amount), spent = b.spent + f.cost
        FROM (SELECT key_id, month, sum(amount)::bigint AS amount, sum(cost)::bigint AS cost
            FROM found WHERE state = 'open' AND amount > 0 GROUP BY key_id, month) AS f
        WHERE b.key_id = f.key_id AND b.month = f.month
    ), written AS (
        INSERT INTO ledger (request_id, tenant_id, user_id, key_id, model, agent_id, month, prompt_tokens, completion_tokens, cost, outcome, at)
        SELECT id, tenant_id, user_id, key_id, model, agent_id, month, prompt, completion, cost, outcome, coalesce(at, now())
        FROM found WHERE state = 'open' AND outcome <> 'void'
        ON CONFLICT DO NOTHING
    ), barred AS (
        INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
            state, in_flight, owner_id, epoch, deadline, created_at, ended_at)
        SELECT id, key_id, '', '', '', 'epoch', 0, 0, 0, 0, 'settled', false, '', 0, coalesce(at, now()), coalesce(at, now()), coalesce(at, now())
        FROM found WHERE state IS NULL AND outcome = 'void'
        ON CONFLICT DO NOTHING
    )
    SELECT f.id, coalesce(f.state, 'unknown') FROM found f;
END $$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION books_settle;
DROP FUNCTION books_change;
DROP FUNCTION books_admit;
DROP FUNCTION books_lock;
DROP FUNCTION books_tokens;
DROP FUNCTION books_cost;
