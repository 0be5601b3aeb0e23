-- A turn of one key, as in migration 00012, that tells what it has decided before it writes.
--
-- A worker can begin while the books still write, which takes longer than to decide. So what is
-- read comes first, then the decision, and then all that is written. The decision is told by
-- a message of severity INFO, which PostgreSQL sends at once, whatever client_min_messages is.
-- It is made under the locks of the turn, and holds once that is committed.
--
-- The function of 00012 stays for edges of before.

-- +goose Up

-- +goose StatementBegin
-- Settles a request, unless settle_id is null, and then admits one, unless ask_id is null, both
-- of one key; see books_settle and books_admit. The two aren't the same request. settled is the
-- state of the first. ahead says that an admission is to be told: granted, reserved_amount, token_price,
-- charged_month in days since 1970, slots, slots_free, budget (- for none) and budget_free.
CREATE FUNCTION books_turn_one(
    at timestamptz, of_key text,
    settle_id text, settle_prompt bigint, completion bigint, how text,
    owner text, owner_epoch bigint, open_tokens bigint,
    ask_tenant text, ask_model text, ask_id text, prompt bigint, lim bigint, agent text, timeout bigint, ahead boolean,
    OUT settled text,
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
    full_time bigint; flying integer; known boolean := true; -- as they were before
    r reservations; tokens bigint; charge bigint := 0; gave bigint := 0; freed integer := 0; -- by the settlement
    was reservations; k record; waits boolean;
    fresh boolean := false; -- it is admitted now
    joint boolean := false; -- the budget's row gets settlement and admission at once
    need bigint := 0; least_need bigint; unspent bigint; free bigint; next_full bigint; allowed bigint := 0;
BEGIN
    -- The locks of books_lock in its order, and its help if rows are missing.
    IF ask_id IS NOT NULL THEN
        SELECT b.full_at INTO full_time FROM tenant_buckets b WHERE b.tenant_id = ask_tenant FOR NO KEY UPDATE;
        known := FOUND;
    END IF;
    IF known THEN
        SELECT a.in_flight INTO flying FROM key_accounts a WHERE a.key_id = of_key FOR NO KEY UPDATE;
        known := FOUND;
    END IF;
    IF NOT known THEN
        PERFORM books_lock(CASE WHEN ask_id IS NULL THEN '{}' ELSE ARRAY[ask_tenant] END, ARRAY[of_key]);
        SELECT b.full_at INTO full_time FROM tenant_buckets b WHERE b.tenant_id = ask_tenant;
        SELECT a.in_flight INTO flying FROM key_accounts a WHERE a.key_id = of_key;
        flying := coalesce(flying, 0);
    END IF;

    -- What the settlement gives back.
    IF settle_id IS NOT NULL THEN
        SELECT * INTO r FROM reservations x WHERE x.id = settle_id AND x.key_id = of_key;
        settled := coalesce(r.state, 'unknown');
        IF settled = 'open' THEN
            tokens := coalesce(settle_prompt, r.prompt_tokens);
            IF how <> 'void' THEN
                charge := least(r.amount, books_cost(tokens + completion, r.price));
            END IF;
            gave := r.amount; freed := r.in_flight::integer;
        END IF;
    END IF;

    -- The decision.
    IF ask_id IS NOT NULL THEN
        SELECT * INTO was FROM reservations x WHERE x.id = ask_id;
        SELECT o.id IS NOT NULL AS alive, t.state AS tenant_state, t.qps,
            q.id, q.tenant_id, q.user_id, q.revoked_at, q.expires_at, q.budget_cents * 1000000 AS cap, coalesce(q.concurrency, 0) AS concurrency,
            u.state AS user_state, greatest(0, flying - freed) AS in_flight, m.key_id IS NOT NULL AS charged,
            coalesce(m.spent, 0) AS spent, coalesce(m.reserved, 0) AS reserved,
            coalesce((SELECT p.price FROM model_prices p WHERE p.tenant_id = ask_tenant AND p.model = ask_model),
                (SELECT p.price FROM model_prices p WHERE p.tenant_id = '' AND p.model = ask_model), 0) AS price
        INTO k
        FROM (SELECT) AS one
        LEFT JOIN api_keys q ON q.id = of_key
        LEFT JOIN users u ON u.id = q.user_id
        LEFT JOIN tenants t ON t.id = ask_tenant
        LEFT JOIN budgets m ON m.key_id = of_key AND m.month = this_month
        LEFT JOIN owners o ON o.id = owner AND o.epoch = owner_epoch AND o.held;
        joint := gave > 0 AND r.month = this_month;
        IF joint AND k.charged THEN
            k.reserved := greatest(0, k.reserved - gave);
            k.spent := k.spent + charge;
        END IF;

        reason := ''; granted := 0; reserved_amount := 0; token_price := 0; charged_month := this_month; wait_ms := 0;
        slots := k.concurrency; budget := k.cap;
        unspent := coalesce(k.cap, no_cap) - k.spent;
        free := unspent - k.reserved;
        IF was.state = 'open' AND was.key_id = of_key THEN
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
            next_full := greatest(CASE WHEN full_time <= now_ns + 60 * one_second THEN full_time ELSE 0 END, now_ns) + one_second / coalesce(k.qps, 1);
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
                fresh := true; granted := allowed; reserved_amount := need;
                k.in_flight := k.in_flight + 1;
                free := free - need; k.reserved := k.reserved + need;
            END IF;
        END IF;
        slots_free := greatest(0, slots - k.in_flight);
        budget_free := greatest(0, free);
        IF ahead AND reason = '' THEN
            RAISE INFO '% % % % % % % %', granted, reserved_amount, token_price, charged_month - date 'epoch', slots, slots_free, coalesce(budget::text, '-'), budget_free;
        END IF;
    END IF;

    -- All that is written.
    IF settled = 'open' THEN
        IF how <> 'void' THEN
            INSERT INTO ledger (request_id, tenant_id, user_id, key_id, model, agent_id, month, prompt_tokens, completion_tokens, cost, outcome, at)
            VALUES (r.id, r.tenant_id, r.user_id, r.key_id, r.model, r.agent_id, r.month, tokens, completion, charge, how, moment)
            ON CONFLICT DO NOTHING;
        END IF;
        UPDATE reservations x SET state = CASE how WHEN 'expired' THEN 'expired' ELSE 'settled' END, in_flight = false, ended_at = moment
        WHERE x.id = r.id;
    ELSIF settled = 'unknown' AND how = 'void' THEN
        INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
            state, in_flight, owner_id, epoch, deadline, created_at, ended_at)
        VALUES (settle_id, of_key, '', '', '', 'epoch', 0, 0, 0, 0, 'settled', false, '', 0, moment, moment, moment)
        ON CONFLICT DO NOTHING;
    END IF;
    IF gave > 0 AND NOT joint THEN
        UPDATE budgets x SET reserved = greatest(0, x.reserved - gave), spent = x.spent + charge
        WHERE x.key_id = of_key AND x.month = r.month;
    END IF;
    IF fresh THEN
        UPDATE tenant_buckets x SET full_at = next_full WHERE x.tenant_id = ask_tenant;
        INSERT INTO reservations (id, key_id, tenant_id, user_id, model, month, price, prompt_tokens, limit_tokens, amount,
            owner_id, epoch, agent_id, deadline, created_at)
        VALUES (ask_id, of_key, ask_tenant, k.user_id, ask_model, this_month, k.price, prompt, allowed, need,
            owner, owner_epoch, nullif(agent, ''), moment + timeout * interval '1 millisecond', moment);
    END IF;
    IF joint OR fresh AND need > 0 THEN
        UPDATE budgets x SET reserved = k.reserved, spent = k.spent WHERE x.key_id = of_key AND x.month = this_month;
        IF NOT FOUND AND fresh AND need > 0 THEN
            INSERT INTO budgets (key_id, month, reserved) VALUES (of_key, this_month, k.reserved);
        END IF;
    END IF;
    IF fresh AND freed > 0 AND flying > 0 THEN
        -- The slot goes from one to the other, unless somebody is to be told of its release.
        SELECT w.waits_for_slot INTO waits FROM submission_turns w WHERE w.key_id = of_key FOR UPDATE;
        IF waits THEN
            UPDATE key_accounts x SET in_flight = flying - 1 WHERE x.key_id = of_key;
            UPDATE key_accounts x SET in_flight = flying WHERE x.key_id = of_key;
        END IF;
    ELSIF fresh OR freed > 0 THEN
        UPDATE key_accounts x SET in_flight = greatest(0, flying - freed) + fresh::integer WHERE x.key_id = of_key;
    END IF;
END $$;
-- +goose StatementEnd

-- +goose Down
DROP FUNCTION books_turn_one(timestamptz, text, text, bigint, bigint, text, text, bigint, bigint, text, text, text, bigint, bigint, text, bigint, boolean);
