-- Finish the runs of a batch: results, failures and retries in one step. What it leaves is what RQ's own methods leave
-- (worker.handle_job_success, handle_job_failure and job.retry), for jobs without dependents.
--
-- KEYS  1 rq:wip zset, 2 rq:finished zset, 3 rq:failed zset, 4 queue list, 5 the worker's hash, 6 its set of executions,
--       7 the model's counters
-- ARGV  1 RQ's key prefix, 2 seconds to keep the counters, 3 worker name, 4 time now in whole seconds, 5 how many runs;
--       then for each run:
--       job id, execution id, 'finished' | 'failed' | 'retry' | 'retry_front', status, when it started and ended as RQ
--       writes it, seconds it took, seconds to keep it (-1: for ever), and three lists, each after its length: further
--       hash fields and values, fields and values of the result entry, counters to raise by one
-- Returns for each run: 1 done; 0 given up meanwhile, by a recovery or a cancel, so nothing was written;
--       2 it has dependents: nothing was written, RQ's own method must finish it.
local prefix, worker, now, at = ARGV[1], ARGV[3], tonumber(ARGV[4]), 5
local counts = {}

local function take()
  at = at + 1
  return ARGV[at]
end

local function take_list()
  local list = {}
  for n = 1, tonumber(take()) do
    list[n] = take()
  end
  return list
end

local done = {}
for n = 1, tonumber(ARGV[5]) do
  local id, execution, kind, status, started, ended, seconds = take(), take(), take(), take(), take(), take(), take()
  local ttl = tonumber(take())
  local fields, entry, counters = take_list(), take_list(), take_list()
  local composite = id .. ':' .. execution
  local job = prefix .. ':job:' .. id
  local retry = kind == 'retry' or kind == 'retry_front'
  if not retry and redis.call('EXISTS', job .. ':dependents') == 1 then
    done[n] = 2
  -- The fence: whoever removes this member owns the run's end.
  elseif redis.call('ZREM', KEYS[1], composite) == 0 then
    done[n] = 0
  else
    redis.call('DEL', prefix .. ':execution:' .. composite)
    redis.call('ZREM', prefix .. ':executions:' .. id, execution)
    redis.call('SREM', KEYS[6], composite)
    redis.call('HINCRBY', KEYS[5], kind == 'finished' and 'successful_job_count' or 'failed_job_count', 1)
    redis.call('HINCRBYFLOAT', KEYS[5], 'total_working_time', seconds)
    for _, name in ipairs(counters) do
      counts[name] = (counts[name] or 0) + 1
    end
    if redis.call('TYPE', job)['ok'] ~= 'hash' then
      -- Deleted while it ran: there is nothing left to finish.
      done[n] = 0
    else
      done[n] = 1
      redis.call('HSET', job, 'status', status, 'started_at', started, 'ended_at', ended, 'last_heartbeat', ended,
        'worker_name', worker, unpack(fields))
      if retry then
        redis.call(kind == 'retry' and 'RPUSH' or 'LPUSH', KEYS[4], id)
      else
        local results = prefix .. ':results:' .. id
        redis.call('XADD', results, 'MAXLEN', 10, '*', unpack(entry))
        -- Each registry marks "for ever" in its own way.
        local score = kind == 'finished' and '+inf' or -1
        if ttl == -1 then
          redis.call('PERSIST', results)
        else
          score = now + ttl
          redis.call('EXPIRE', results, ttl)
          redis.call('EXPIRE', job, ttl)
          -- RQ's own spelling, with two colons.
          redis.call('EXPIRE', prefix .. ':job::' .. id .. ':dependencies', ttl)
        end
        redis.call('ZADD', KEYS[kind == 'finished' and 2 or 3], score, id)
      end
    end
  end
end
for name, count in pairs(counts) do
  redis.call('HINCRBY', KEYS[7], name, count)
end
redis.call('HINCRBY', KEYS[7], 'batches', 1)
redis.call('EXPIRE', KEYS[7], ARGV[2])
return done
