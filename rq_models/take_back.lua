-- Cancel the jobs that are still queued.
--
-- KEYS  the queue list of each job
-- ARGV  1 RQ's key prefix, 2 seconds to keep what is cancelled, then the id of each job
-- Returns for each job whether it was queued still.
--
-- RQ never clears rq:canceled, and callers may give up often: so these are not listed there, and expire.
local call, answers = redis.call, {}
for n, queue in ipairs(KEYS) do
  local id = ARGV[2 + n]
  local job = ARGV[1] .. ':job:' .. id
  answers[n] = call('LREM', queue, 1, id)
  if answers[n] > 0 and call('EXISTS', job) == 1 then
    call('HSET', job, 'status', 'canceled')
    call('EXPIRE', job, ARGV[2])
  end
end
return answers
